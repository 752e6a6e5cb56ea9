"""Linear layers whose three matrix products are of 4 or 8 bits, while their weights learn in full precision."""
