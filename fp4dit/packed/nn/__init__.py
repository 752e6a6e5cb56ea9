"""Layers with packed weights, and the backends that multiply with them.

`linear` holds the layers and `backends` chooses how a product is computed. On CPUs `integer_ops`
calls C kernels that sum up whole numbers: `token_quant` makes them of tokens, `integer_weight` of
packed weights. On GPUs `gpu_backends` calls the Triton kernels of `triton_ops`, which is imported
within functions only, because not every machine has Triton. `expanded_backend` multiplies by
weights that were expanded to a byte each, on both.
"""
