"""Packed checkpoints: real 4-bit weights, loaded and run by stock diffusers.

`encoding` is the file format, `nn` the layers and kernels that run it, and `integrations` connects
both to diffusers, transformers and other quantization libraries.
"""
