"""A checkpoint compared with transformers and peft."""
