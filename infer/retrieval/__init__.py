"""Retrievers: BM25 over words and public dense encoders, written out by hand."""

from infer.retrieval.bm25 import BM25
from infer.retrieval.encoder import Encoder

__all__ = ["BM25", "Encoder"]
