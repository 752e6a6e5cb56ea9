"""Packed checkpoints in diffusers and transformers.

Importing `diffusers` and `transformers` registers fp4dit with the library of the same name.
"""
