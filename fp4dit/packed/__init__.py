"""Packed checkpoints: real 4-bit weights, loaded and run by stock diffusers.

`encoding` is the file format, `nn` the layers and kernels that run it, `integrations` connects both
to diffusers and transformers, and `targets` converts them to the formats of other libraries.
"""
