"""A checkpoint held against transformers and peft."""
