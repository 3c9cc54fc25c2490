"""Retrieval: BM25, public dense encoders in plain PyTorch, exact search, and spelling repair."""
