"""Weights of 4, 6 and 8 bits as they lie in memory and in files, and products with them."""
