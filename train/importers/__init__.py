"""Records from tables, brat and CoNLL files."""
