"""Layers with packed weights, and the backends that multiply with them.

`linear` holds the layers and `backends` chooses how a product is computed. `triton_ops` is imported
only by the GPU backends, because not every machine has Triton.
"""
