"""General helpers: files, tensors on disk, locations of weights, statistics, formatting.

All packages may import from here. Nothing here imports from the rest of the library.
"""
