"""Retrievers: BM25 over words and public dense encoders, written out by hand."""
