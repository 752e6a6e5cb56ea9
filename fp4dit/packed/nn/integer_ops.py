"""Products of quantized tokens and packed weights in exact integer arithmetic, on a CPU.

The kernels are written in C (`integer_kernels.c`) and compiled when the package is installed. They
are called through ctypes. Without a compiler there are none, and `find_kernels` returns None.

The values of many formats are whole numbers times a power of two: those of E2M1 are 0, 1, 2, 3, 4,
6, 8 and 12 halves. Products of whole numbers are summed up exactly. What is rounded is one product
with the scale, and one addition, for each group of a row.
"""

import ctypes
import logging
import math
import os
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt8
from torch import Tensor

from fp4dit.numerics.block_scales import E4M3, E8M0Scale, NVFP4Scale
from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import Affine, Blocks, Scale
from fp4dit.numerics.scale_rules import AbsMax, ScaleRule

MAX_SUM = 2**31 - 1  # of the products of a segment
MAX_WEIGHT = 127
TINY = torch.finfo(torch.float32).tiny
# The widest numbers that one, two and three bytes hold when half of their range is added to them.
PLANE_LIMITS = (2**7 - 1, 2**15 - 1, 2**23 - 1)
# Multiplications that are worth the start of a thread, which takes about 20 microseconds.
MULTIPLICATIONS_PER_THREAD = 2**21

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of tokens and products, as the kernels count them


@dataclass(frozen=True)
class IntegerGrid:
    """The values of a number format as whole numbers times a power of two.

    Attributes:
        fmt: The format.
        largest: The largest whole number.
        planes: The bytes of one number, including what is added to make it positive.

    Example:
        >>> find_integer_grid(floating(2, 3))  # E2M3: 60 eighths are 7.5
        IntegerGrid(fmt=..., largest=60, planes=1)
    """

    fmt: NumberFormat
    largest: int
    planes: int

    @property
    def offset(self) -> int:
        """What is added to each number so that none is negative."""
        return 2 ** (8 * self.planes - 1) if self.fmt.min < 0 else 0


def find_integer_grid(fmt: object) -> IntegerGrid | None:
    """Return the grid of a format whose values three bytes hold, else None."""
    if not isinstance(fmt, NumberFormat):
        return None
    largest = fmt.max / fmt.smallest
    if fmt.min == 0 and largest < 2**8:
        return IntegerGrid(fmt, int(largest), 1)
    for planes, limit in enumerate(PLANE_LIMITS, 1):
        if largest <= limit and fmt.min < 0:
            return IntegerGrid(fmt, int(largest), planes)
    return None


RULES = ("given", "absmax", "e8m0_even", "nvfp4")  # as the kernels count them


@dataclass(frozen=True)
class FusedScale:
    """A scale rule that the kernels compute themselves.

    Attributes:
        kind: The rule, one of `RULES`.
        fmt: The format that scales are kept in; None for fp32.
        least: The least scale.
        tensor_scale: The scale of the tensor, of NVFP4.
        ratios: What the ideal scale of a block is multiplied by to try others, of NVFP4.
        rule: A rule that gives any blocks of the tensor the same scales.
    """

    kind: str
    fmt: NumberFormat | None
    least: float
    tensor_scale: float
    ratios: Sequence[float]
    rule: ScaleRule

    def describe(self, fmt: NumberFormat, dtype: torch.dtype) -> "_Rounding":
        """Return the rounding of values of a dtype to a format as the kernels take it."""
        return _Rounding(
            format=_describe_format(fmt, fmt.min),
            dtype=DTYPES[dtype],
            rule=RULES.index(self.kind),
            scales=_describe_format(self.fmt, self.least),
            tensor_scale=self.tensor_scale,
            num_ratios=len(self.ratios),
            ratios=(c_float * len(self.ratios))(*self.ratios),
        )


Scaling = Scale | Affine | FusedScale


def find_fused_scale(rule: ScaleRule, fmt: NumberFormat, blocks: Blocks) -> FusedScale | None:
    """Return how the kernels compute the scales of blocks, or None if they do not know the rule."""
    if isinstance(rule, AbsMax):
        least = TINY if rule.dtype is None else rule.dtype.smallest
        return FusedScale("absmax", rule.dtype, least, 1.0, (), rule)
    if rule == E8M0Scale():
        return FusedScale("e8m0_even", None, 0.0, 1.0, (), rule)
    if isinstance(rule, NVFP4Scale) and rule.candidates and rule.p == 2:
        fixed = rule if rule.amax is not None else replace(rule, amax=find_absmax(blocks))
        tensor_scale = fixed.tensor_scale(blocks[:1].float(), fmt).item()
        return FusedScale("nvfp4", E4M3, rule.min_scale, tensor_scale, rule.candidates, fixed)
    return None


def find_absmax(x: Tensor) -> float:
    """Return the largest magnitude, in one pass over memory; NaN if there is one."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).item()


def compute_scale(scaling: Scaling, blocks: Blocks, fmt: NumberFormat) -> Scale | Affine:
    """Return the scales that the rule of a fused scale gives some blocks."""
    assert isinstance(scaling, FusedScale)
    qparams = scaling.rule(blocks.float(), fmt)
    assert isinstance(qparams, Scale)
    return qparams


@dataclass(frozen=True)
class IntegerTokens:
    """Quantized tokens.

    Attributes:
        grid: The grid of their format.
        numbers: The whole numbers plus an offset, in planes of bytes, the most significant first.
        scale: The scale of each group of a token, times the smallest value of the format.
        zero: What is subtracted from the numbers of each group instead of the offset, or None.
    """

    grid: IntegerGrid
    numbers: UInt8[Tensor, "planes m k"]
    scale: Float32[Tensor, "m groups"]
    zero: Int32[Tensor, "m groups"] | None


@dataclass(frozen=True)
class IntegerWeight:
    """A packed weight as the kernels read it. Its tensors are the packed buffers, or tables.

    Attributes:
        shape: Rows and columns.
        group: The number of columns that share a scale.
        largest: The largest magnitude of the whole numbers.
        codes: Codes of 4 or 8 bits.
        tables: The whole numbers of two codes by byte (4 bits), or of one (8 bits).
        table_index: For each group which table its codes are read by, or None if there is one.
        scales: Bytes that index `scale_values`, or numbers in fp16 or fp32.
        scale_bytes: The bytes of one: 1, 2 or 4.
        scale_values: A row of 256 scales for all tables, or one for each; None if `scales` are
            numbers.
        factors: For each table, what its whole numbers are multiplied by: the smallest value of
            their format.
    """

    shape: tuple[int, int]
    group: int
    largest: int
    codes: UInt8[Tensor, "n bytes"]
    tables: Tensor
    table_index: UInt8[Tensor, "blocks"] | None
    scales: Tensor
    scale_bytes: int
    scale_values: Float32[Tensor, "rows 256"] | None
    factors: Float32[Tensor, "tables"]

    @cached_property
    def struct(self) -> "_Weight":
        """The weight as the kernels take it."""
        n, k = self.shape
        return _Weight(
            n,
            k,
            self.group,
            8 * self.codes.shape[1] // k,
            self.scale_bytes,
            self.codes.data_ptr(),
            self.tables.data_ptr(),
            _address(self.table_index),
            self.scales.data_ptr(),
            _address(self.scale_values),
            self.factors.data_ptr(),
            0 if self.scale_values is None or len(self.scale_values) == 1 else 256,
        )


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("m", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("planes", c_int32),
        ("offset", c_int32),
        ("numbers", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
    )


class _Weight(ctypes.Structure):
    _fields_ = (
        ("n", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("bits", c_int32),
        ("scale_bytes", c_int32),
        ("codes", c_void_p),
        ("tables", c_void_p),
        ("table_index", c_void_p),
        ("scales", c_void_p),
        ("scale_values", c_void_p),
        ("factors", c_void_p),
        ("scale_values_stride", c_int64),
    )


class _Format(ctypes.Structure):
    _fields_ = (
        ("floor", c_float),
        ("shift", c_float),
        ("smallest", c_float),
        ("largest", c_float),
        ("least", c_float),
    )


class _Rounding(ctypes.Structure):
    _fields_ = (
        ("format", _Format),
        ("dtype", c_int32),
        ("rule", c_int32),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("scale_stride", c_int64),
        ("scales", _Format),
        ("tensor_scale", c_float),
        ("num_ratios", c_int32),
        ("ratios", ctypes.POINTER(c_float)),
        ("undecided", c_void_p),
    )


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels.

    Attributes:
        library: The library.
        names: The names of the kernels that this processor runs, by number, the fastest first.
    """

    library: ctypes.CDLL
    names: dict[int, str]

    def choose(self, largest_weight: int) -> int:
        """Return the number of the kernel for weights of at most this magnitude."""
        for number, name in self.names.items():
            # The sums of two products that AVX2 has in 16 bits hold weights of up to 64.
            if name != "avx2" or largest_weight <= 64:
                return number
        raise AssertionError("every processor has a kernel for all weights, or none")


@lru_cache(maxsize=1)
def find_kernels() -> Kernels | None:
    """Return the kernels, or None if they were not compiled or this processor cannot run them.

    The environment variable FP4DIT_KERNEL=avx2 restricts the choice, and FP4DIT_KERNEL=none turns
    the kernels off.
    """
    wanted = os.environ.get("FP4DIT_KERNEL", "")
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_integer{suffix}")
        if path.is_file():
            return load_kernels(path, wanted)
    logging.getLogger(__name__).warning(
        "fp4dit was installed without a C compiler, so quantized layers are slower on the CPU: "
        "install gcc, then fp4dit again"
    )
    return None


def load_kernels(path: Path, wanted: str = "") -> Kernels | None:
    """Load a compiled library, with the kernels whose name begins with `wanted`."""
    library = ctypes.CDLL(str(path))
    library.fp4dit_kernel_name.restype = ctypes.c_char_p
    names = {}
    for number in range(8):
        name = library.fp4dit_kernel_name(number)
        if name is not None and name.decode().startswith(wanted):
            names[number] = name.decode()
    return Kernels(library, names) if names else None


def require_kernels() -> Kernels:
    """Return the kernels. Call `find_kernels` first, to know that there are any."""
    kernels = find_kernels()
    assert kernels is not None, "no kernels were compiled, or this processor cannot run them"
    return kernels


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
        rounding = _Rounding(format=_describe_format(fmt, fmt.min), dtype=DTYPES[x.dtype])
        scale = scaling.scale.float().contiguous()
        zero = scaling.zero.float().contiguous() if isinstance(scaling, Affine) else None
        rounding.scale, rounding.zero = scale.data_ptr(), _address(zero)
        rounding.scale_stride = int(scale.numel() > 1)
    described = None if tokens is None else ctypes.byref(_describe_tokens(tokens))
    failed = kernels.library.fp4dit_quantize(
        ctypes.byref(rounding),
        c_void_p(x.data_ptr()),
        c_int64(m * k),
        c_int64(group),
        described,
        c_void_p(_address(values)),
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
        ctypes.byref(_describe_tokens(x)),
        ctypes.byref(weight.struct),
        c_int64(segment),
        c_void_p(_address(bias)),
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


@lru_cache
def _describe_format(fmt: NumberFormat | None, least: float) -> _Format:
    if fmt is None:
        return _Format(largest=math.inf, least=least)
    floor, shift = math.ldexp(1.0, fmt.min_exponent), math.ldexp(1.5, 23 - fmt.mantissa)
    return _Format(floor, shift, fmt.smallest, fmt.max, least)


def _describe_tokens(tokens: IntegerTokens) -> _Tokens:
    _, m, k = tokens.numbers.shape
    return _Tokens(
        m,
        k,
        k // tokens.scale.shape[1],
        tokens.grid.planes,
        tokens.grid.offset,
        tokens.numbers.data_ptr(),
        tokens.scale.data_ptr(),
        _address(tokens.zero),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def count_threads(multiplications: int) -> int:
    """Return how many threads are worth their start for so many multiplications."""
    return max(1, min(torch.get_num_threads(), multiplications // MULTIPLICATIONS_PER_THREAD))
