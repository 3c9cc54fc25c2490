"""Compares a checkpoint with transformers, and an adapter with peft."""
