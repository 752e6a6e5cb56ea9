"""Packed checkpoints in other libraries.

Importing `diffusers` and `transformers` registers fp4dit with the library of the same name.
`compressed_tensors_export` and `compressed_tensors_import` convert checkpoints.
"""
