"""Layers with packed weights, and the backends that multiply with them.

`linear` holds the layers and `backends` chooses how a product is computed. On CPUs `integer_ops`
calls C kernels that sum up whole numbers: `token_quant` makes them of tokens, `integer_weight` of
packed weights. `triton_ops` is imported only by the GPU backends, because not every machine has
Triton.
"""
