"""The run card, the memory plan, provenance."""
