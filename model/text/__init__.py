"""Tokenizers and chat forms."""
