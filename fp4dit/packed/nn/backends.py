"""Backends that multiply by a packed weight, and the choice among them."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from fp4dit.packed.encoding.layout import PackedBuffers
from fp4dit.packed.nn.base import Backend, PackedWeight, is_inference
from fp4dit.packed.nn.expanded_backend import ExpandedBackend
from fp4dit.packed.nn.gpu_backends import Fp8Backend, Int8Backend, WeightOnlyBackend
from fp4dit.packed.nn.integer_operands import IntegerWeight
from fp4dit.packed.nn.integer_ops import find_segment, multiply_integers
from fp4dit.packed.nn.integer_weight import describe_weight
from fp4dit.packed.nn.token_quant import (
    TokenGrid,
    can_use_kernels,
    find_token_grid,
    quantize_to_grid,
)


class DequantizeBackend:
    """Dequantize the weight to the model's dtype for one product, then call `F.linear`.

    It runs everywhere, and its results are bit-exact with the simulation.

    Example:
        >>> packed = pack_layer(quant_layer)  # a `QuantLayer` whose weight is committed
        >>> DequantizeBackend()(packed, x).equal(quant_layer(x))
        True
    """

    name, min_rows = "dequantize", 0

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        return True

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        return F.linear(layer.input_fake_quant(x), layer.dequantize(layer.dtype), layer.bias)


IntegerOperands = tuple[TokenGrid, IntegerWeight]


class IntegerBackend:
    """Compiled kernels for CPUs that multiply whole numbers.

    The tokens and the weight have to be whole numbers times scales. The sums of their products are
    exact, so that the result differs from the simulation in the rounding of fp32 sums only.

    Example:
        >>> x = torch.zeros(3, packed_layer.in_features)
        >>> IntegerBackend().supports(packed_layer, x)  # if the kernels were compiled
        True
    """

    name, min_rows = "integer", 0

    def __init__(self) -> None:
        # The operands of each layer, and the state of its buffers when they were found.
        self.known: WeakKeyDictionary[PackedWeight, tuple[object, IntegerOperands | None]]
        self.known = WeakKeyDictionary()

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        bias, operands = layer.bias, None
        if not is_inference(layer, x) or (bias is not None and bias.dtype != x.dtype):
            return False
        if can_use_kernels(x):
            operands = self.find_operands(layer)
        if operands is None:
            return False
        # Three products of bytes take longer than one in bf16, and less than one in fp32.
        return operands[0].numbers.planes < 3 or x.dtype == torch.float32

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        operands = self.find_operands(layer)
        assert operands is not None, "call `supports` first"
        token_grid, weight = operands
        tokens = quantize_to_grid(layer.input_fake_quant, x, token_grid)
        y = multiply_integers(tokens, weight, layer.bias, x.dtype)
        return y.view(*x.shape[:-1], layer.out_features)

    def find_operands(self, layer: PackedWeight) -> IntegerOperands | None:
        """Return what `find_integer_operands` finds, or found since the buffers changed last."""
        buffers, fake_quant = layer.packed_buffers, layer.input_fake_quant
        # An inference tensor has no version. Static scales are buffers as soon as there are any.
        state: list[object] = [id(fake_quant), *fake_quant._buffers]
        for b in buffers.values():
            state += b.data_ptr(), None if b.is_inference() else b._version
        known = self.known.get(layer)
        if known is None or known[0] != state:
            known = self.known[layer] = state, find_integer_operands(layer, buffers)
        return known[1]


def find_integer_operands(layer: PackedWeight, buffers: PackedBuffers) -> IntegerOperands | None:
    """Return how tokens become whole numbers, and the weight; None if a product is inexact."""
    grid = find_token_grid(layer.input_fake_quant, layer.in_features)
    if grid is None:
        return None
    weight = describe_weight(layer.layout, buffers, layer.in_features)
    if weight is None:
        return None
    segment = find_segment(grid.numbers, grid.group, weight.group, weight.largest)
    return None if segment is None else (grid, weight)


BACKENDS: Sequence[Backend] = (
    IntegerBackend(),
    ExpandedBackend(),
    Int8Backend(),
    Fp8Backend(),
    WeightOnlyBackend(),
    DequantizeBackend(),
)


def choose_backend(layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Backend:
    """Return the first of `BACKENDS` that supports the product and is meant for so many rows.

    The order is fixed, from the most specialized backend to the most general one:

    1. Integer needs a CPU and the compiled kernels, and tokens and a weight that are whole numbers
       times scales.
    2. Expanded needs a layer whose weight `expand_weights_` expanded, tokens in the format that it
       was expanded for, more than 16 rows, and a GPU of sm_75 or later (FP8: sm_89). On a CPU it is
       for INT8 where no kernels were compiled, which are faster.
    3. INT8 needs a GPU of sm_80 or later, but not of sm_100, a 4-bit weight whose codes expand to
       int8, dynamic tokens in a format whose whole numbers int8 holds, and more than 64 rows.
    4. FP8 needs a GPU of sm_89 or later, such a weight and such rows, and dynamic tokens in a
       format that E4M3 holds. INT8 comes first because its sums are exact, so that all GPUs give
       the same bits, and because its tensor cores are as fast, on GeForce cards of Ada twice.
    5. Weight-only needs a GPU of sm_80 or later and such a weight. It reads a quarter of the bytes
       of a 16-bit weight, which is what counts for few rows.
    6. Dequantize runs for every format on every device.

    None but the last is for products that autograd has to see.
    """
    rows = x.numel() // layer.in_features
    for backend in BACKENDS:
        if rows >= backend.min_rows and backend.supports(layer, x):
            return backend
    return BACKENDS[-1]


def packed_matmul(layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
    """Return x W^T + bias, with x quantized by `layer.input_fake_quant`."""
    # To a mode like that of quantized attention this is one function, not the fifty that it calls.
    if not torch.compiler.is_compiling() and has_torch_function_unary(x):
        return handle_torch_function(packed_matmul, (x,), layer, x)
    return choose_backend(layer, x)(layer, x)
