"""Generation: a tree of prompts, its forward pass, decoding."""
