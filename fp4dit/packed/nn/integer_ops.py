"""Products of quantized tokens and packed weights in exact integer arithmetic, on a CPU.

Products of whole numbers are summed up exactly. What is rounded is one fused product with the scale
and addition for each group of a row.
"""

import ctypes
import math
from ctypes import c_int32, c_int64, c_void_p

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import Affine
from fp4dit.packed.nn.integer_operands import (
    MAX_SUM,
    FusedScale,
    IntegerGrid,
    IntegerTokens,
    IntegerWeight,
    Rounding,
    Scaling,
    address,
    compute_scale,
    describe_format,
)
from fp4dit.packed.nn.kernels import DTYPES, count_threads, require_kernels


def quantize_to_integers(
    x: Float[Tensor, "m k"], grid: IntegerGrid, group: int, scaling: Scaling
) -> IntegerTokens:
    """Quantize tokens to whole numbers.

    The numbers and scales are those of `Quantizer`, to the bit. A group that holds NaN, or infinity
    with a scale of its own, gets the scale NaN.

    Args:
        x: Tokens in fp32 or bf16.
        grid: The grid of their format.
        group: The number of values that share a scale.
        scaling: The scales of the groups, or a rule by which the kernel computes them.
    """
    m, k = x.shape
    numbers = torch.empty(grid.planes, m, k, dtype=torch.uint8)
    scale = torch.empty(m, k // group)
    zero = torch.empty(m, k // group, dtype=torch.int32) if isinstance(scaling, Affine) else None
    tokens = IntegerTokens(grid, numbers, scale, zero)
    undecided = _quantize(x, grid.fmt, group, scaling, tokens, None)
    if undecided is not None:
        blocks = x.reshape(-1, group)[undecided]
        redone = quantize_to_integers(blocks, grid, group, compute_scale(scaling, blocks, grid.fmt))
        numbers.view(grid.planes, -1, group)[:, undecided] = redone.numbers
        scale.view(-1)[undecided] = redone.scale.view(-1)
    return tokens


def fake_quantize(
    x: Float[Tensor, "m k"], fmt: NumberFormat, group: int, scaling: Scaling
) -> Float[Tensor, "m k"]:
    """Quantize and dequantize tokens of any number format, as `Quantizer` does.

    See `quantize_to_integers` for the arguments.
    """
    values = torch.empty(x.shape, dtype=x.dtype)
    undecided = _quantize(x, fmt, group, scaling, None, values)
    if undecided is not None:
        blocks = x.reshape(-1, group)[undecided]
        redone = fake_quantize(blocks, fmt, group, compute_scale(scaling, blocks, fmt))
        values.view(-1, group)[undecided] = redone
    return values


def _quantize(
    x: Tensor,
    fmt: NumberFormat,
    group: int,
    scaling: Scaling,
    tokens: IntegerTokens | None,
    values: Tensor | None,
) -> Int64[Tensor, "blocks"] | None:
    """Quantize tokens, and return the blocks whose scale the kernel could not decide on."""
    kernels, (m, k) = require_kernels(), x.shape
    x = x.contiguous()
    undecided = None
    if isinstance(scaling, FusedScale):
        rounding = scaling.describe(fmt, x.dtype)
        if len(scaling.ratios) > 1:
            undecided = torch.zeros(m * k // group, dtype=torch.uint8)
            rounding.undecided = undecided.data_ptr()
    else:
        rounding = Rounding(format=describe_format(fmt, fmt.min), dtype=DTYPES[x.dtype])
        scale = scaling.scale.float().contiguous()
        zero = scaling.zero.float().contiguous() if isinstance(scaling, Affine) else None
        rounding.scale, rounding.zero = scale.data_ptr(), address(zero)
        rounding.scale_stride = int(scale.numel() > 1)
    described = None if tokens is None else ctypes.byref(tokens.struct)
    failed = kernels.library.fp4dit_quantize(
        ctypes.byref(rounding),
        c_void_p(x.data_ptr()),
        c_int64(m * k),
        c_int64(group),
        described,
        c_void_p(address(values)),
        c_int32(count_threads(16 * m * k)),
    )
    if failed:
        raise MemoryError("there is not enough memory to quantize tokens")
    return undecided.nonzero().flatten() if undecided is not None and undecided.any() else None


def multiply_integers(
    x: IntegerTokens,
    weight: IntegerWeight,
    bias: Float[Tensor, "n"] | None,
    dtype: torch.dtype,
    kernel: int | None = None,
) -> Float[Tensor, "m n"]:
    """Return x W^T + bias.

    Args:
        x: Quantized tokens.
        weight: Packed weight.
        bias: Bias in `dtype`, or None.
        dtype: The dtype of the product, fp32 or bf16.
        kernel: The number of a kernel; None for the fastest.
    """
    kernels, (n, k) = require_kernels(), weight.shape
    m = x.numbers.shape[1]
    segment = choose_segment(x, weight)
    assert segment is not None, "this product is not exact"
    y = torch.empty(m, n, dtype=dtype)
    number = kernels.choose(weight.largest) if kernel is None else kernel
    failed = kernels.library.fp4dit_multiply(
        c_int32(number),
        ctypes.byref(x.struct),
        ctypes.byref(weight.struct),
        c_int64(segment),
        c_void_p(address(bias)),
        c_int32(DTYPES[dtype]),
        c_void_p(y.data_ptr()),
        c_int32(count_threads(m * n * k)),
    )
    if failed:
        raise MemoryError("there is not enough memory to expand a weight")
    return y


def choose_segment(x: IntegerTokens, weight: IntegerWeight) -> int | None:
    """Return how many columns are summed up in whole numbers; None if no number is right."""
    group = weight.shape[1] // x.scale.shape[1]
    return find_segment(x.grid, group, weight.group, weight.largest)


def find_segment(
    grid: IntegerGrid, token_group: int, weight_group: int, largest: int
) -> int | None:
    """Return the most columns whose sum of products is exact and has one scale.

    It is a multiple of 4, because the kernels multiply 4 columns at a time.

    Args:
        grid: The grid of the tokens.
        token_group: The number of values of a token that share a scale.
        weight_group: The number of values of a row of the weight that share a scale.
        largest: The largest magnitude of the weight's whole numbers.

    Returns:
        The number of columns; None if a group is no multiple of 4, or 4 columns may overflow.
    """
    group = math.gcd(token_group, weight_group)
    for parts in range(1, group // 4 + 1):
        if group % (4 * parts) == 0 and group // parts * grid.largest * largest <= MAX_SUM:
            return group // parts
    return None
