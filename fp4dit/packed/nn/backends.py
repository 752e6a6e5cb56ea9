"""Backends that multiply by a packed weight, and the choice among them.

An FP4 weight is exact in FP8 E4M3, and so are activations in E4M3, E2M3, E3M2 and E2M1. The tensor
cores of sm_89 and later multiply them exactly, so that the result differs from the simulation only
in the rounding of fp32 sums.
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import QParams, Scale
from fp4dit.numerics.quantizer import PerGroup, PerRow
from fp4dit.packed.encoding.layout import Layout, PackedBuffers
from fp4dit.packed.nn.integer_ops import (
    IntegerWeight,
    find_segment,
    multiply_integers,
)
from fp4dit.packed.nn.integer_weight import describe_weight
from fp4dit.packed.nn.limits import MAX_ROW_VALUES
from fp4dit.packed.nn.token_quant import (
    TokenGrid,
    can_use_kernels,
    fast_token_format,
    find_token_grid,
    needs_gradient,
    quantize_to_grid,
)


class PackedWeight(nn.Module):
    """Attributes of a packed layer that backends read. `PackedLinear` is the implementation.

    Attributes:
        layout: Layout of the packed buffers.
        codes: Packed codes, with one row for each output.
        bias: Bias in the model's dtype, or None.
        dtype: Dtype that the weight is dequantized to.
        in_features: Number of inputs, k.
        out_features: Number of outputs, o.
        input_fake_quant: `FakeQuantize` of the input, or the identity.

    Example:
        >>> packed = pack_layer(quant_layer)  # a `QuantLayer` whose weight is committed
        >>> packed.dequantize(torch.float32).equal(quant_layer.weight)
        True
    """

    layout: Layout
    codes: UInt8[Tensor, "o b"]
    bias: Tensor | None
    dtype: torch.dtype
    in_features: int
    out_features: int
    input_fake_quant: nn.Module

    @property
    def packed_buffers(self) -> dict[str, UInt8[Tensor, "..."]]:
        """The buffers of `layout`, by name."""
        raise NotImplementedError

    @property
    def qparams(self) -> QParams:
        """The qparams of the weight in fp32."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        """Return the weight in `dtype`."""
        raise NotImplementedError


@runtime_checkable
class Backend(Protocol):
    """Implementation of x W^T + bias for a packed weight.

    `x` is the input before `layer.input_fake_quant` quantizes it. `min_rows` is the least number of
    rows that the backend is chosen for.

    Example:
        >>> DequantizeBackend().supports(packed_layer, torch.zeros(3, packed_layer.in_features))
        True
    """

    name: str
    min_rows: int

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        """Return whether this layer, input and device can be computed."""
        ...

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        """Return the product. Call `supports` first."""
        ...


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


class WeightOnlyBackend:
    """Triton kernel that expands and scales a 4-bit weight in registers.

    Example:
        >>> x = torch.zeros(3, packed_layer.in_features)  # on the CPU
        >>> WeightOnlyBackend().supports(packed_layer, x)
        False
    """

    name, min_rows = "weight_only", 0

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        return x.is_cuda and can_expand_codes(layer.layout, layer.in_features)

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        from fp4dit.packed.nn import triton_ops  # imports Triton, which not every machine has

        rows = layer.input_fake_quant(x).flatten(0, -2)
        y = triton_ops.weight_only_matmul(
            rows, layer.codes, e4m3_shift(layer.layout), fold_e4m3_factor(layer), layer.bias
        )
        return y.unflatten(0, x.shape[:-1])


class Fp8Backend:
    """Triton kernels that quantize tokens to values of E4M3 and use the FP8 tensor cores.

    With fewer than `min_rows` rows, reading the weight takes most of the time, so that a faster
    product does not make up for the separate kernel that quantizes the tokens.

    Example:
        >>> x = torch.zeros(128, packed_layer.in_features)  # on the CPU
        >>> Fp8Backend().supports(packed_layer, x)
        False
    """

    name, min_rows = "fp8", 65

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        has_fp8 = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)
        if not has_fp8 or layer.in_features > MAX_ROW_VALUES:
            return False
        fmt = fast_token_format(layer.input_fake_quant)
        can_expand = can_expand_codes(layer.layout, layer.in_features)
        return can_expand and fmt is not None and fits_e4m3(fmt)

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        from fp4dit.packed.nn import triton_ops  # imports Triton, which not every machine has

        fmt = fast_token_format(layer.input_fake_quant)
        assert fmt is not None, "call `supports` first"
        values, x_scale = triton_ops.quantize_rows(
            x.flatten(0, -2), fmt.mantissa, fmt.min_exponent, fmt.max
        )
        y = triton_ops.fp8_matmul(
            values,
            x_scale,
            layer.codes,
            e4m3_shift(layer.layout),
            fold_e4m3_factor(layer),
            layer.bias,
            x.dtype,
        )
        return y.unflatten(0, x.shape[:-1])


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
        if bias is not None and (bias.dtype != x.dtype or needs_gradient(bias)):
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
    Fp8Backend(),
    WeightOnlyBackend(),
    IntegerBackend(),
    DequantizeBackend(),
)


def choose_backend(layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Backend:
    """Return the first of `BACKENDS` that supports the product and is meant for so many rows.

    The order is fixed, from the most specialized backend to the most general one:

    1. FP8 needs a GPU of sm_89 or later, a 4-bit weight whose codes expand to E4M3, dynamic tokens
       in a format that E4M3 holds, and more than 64 rows.
    2. Weight-only needs a GPU and such a weight. It reads a quarter of the bytes of a 16-bit
       weight, which is what counts for few rows.
    3. Integer needs a CPU and the compiled kernels, and tokens and a weight that are whole numbers
       times scales.
    4. Dequantize runs for every format on every device.
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


def can_expand_codes(layout: Layout, k: int) -> bool:
    """Return whether a kernel can expand the codes to E4M3 by shifting bits.

    This needs one signed 4-bit format, one scale for each row or for each multiple of 128 values,
    and rows of a multiple of 32 values.
    """
    fmt, granularity = layout.formats[0], layout.granularity
    if not isinstance(fmt, NumberFormat) or len(layout.formats) > 1:
        return False
    has_wide_groups = isinstance(granularity, PerGroup) and granularity.size % 128 == 0
    if not (isinstance(granularity, PerRow) or has_wide_groups):
        return False
    if set(layout.encodings) != {"scale"}:
        return False
    return fmt.min < 0 and fmt.bits == 4 and k % 32 == 0


def e4m3_shift(layout: Layout) -> int:
    """Return by how many bits a code's magnitude is shifted up to the mantissa of E4M3.

    The values of INT4 are those of E1M2 times a power of two, so it is shifted like E1M2.
    """
    fmt = layout.formats[0]
    assert isinstance(fmt, NumberFormat)
    return 3 - min(fmt.mantissa, 2)


def fold_e4m3_factor(layer: PackedWeight) -> Float[Tensor, "o g"]:
    """Return the weight's scales times the factor between a value and its shifted code in E4M3."""
    fmt, qparams = layer.layout.formats[0], layer.qparams
    assert isinstance(qparams, Scale)
    exponent, mantissa = divmod(7 << e4m3_shift(layer.layout), 8)
    shifted_max = math.ldexp(1 + mantissa / 8, exponent - 7)  # the largest magnitude, 7, in E4M3
    return (qparams.scale * (fmt.max / shifted_max)).view(layer.out_features, -1)


def fits_e4m3(fmt: NumberFormat) -> bool:
    """Return whether E4M3 holds all values of a format.

    Only attributes are compared, because torch.compile cannot trace a comparison of all values.
    """
    has_range = fmt.smallest >= E4M3.smallest and fmt.max <= E4M3.max
    return has_range and fmt.mantissa <= E4M3.mantissa
