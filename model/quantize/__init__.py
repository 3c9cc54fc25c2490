"""Weight quantization to 8 and 4 bits."""
