"""Ranks, shards and checkpoints."""
