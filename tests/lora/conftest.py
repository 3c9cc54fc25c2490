"""Makes tiny_adapters importable."""
