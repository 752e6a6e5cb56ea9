"""Tokens, weights and scale rules as the integer kernels take them.

The values of many formats are whole numbers times a power of two: those of E2M1 are 0, 1, 2, 3, 4,
6, 8 and 12 halves.
"""

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

from fp4dit.numerics.block_scales import E4M3, E8M0Scale, NVFP4Scale
from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import Affine, Blocks, Scale
from fp4dit.numerics.scale_rules import AbsMax, ScaleRule
from fp4dit.packed.nn.kernels import DTYPES

MAX_SUM = 2**31 - 1  # of the products of a segment
MAX_WEIGHT = 127
TINY = torch.finfo(torch.float32).tiny
# The widest numbers that one, two and three bytes hold when half of their range is added to them.
PLANE_LIMITS = (2**7 - 1, 2**15 - 1, 2**23 - 1)


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

    def describe(self, fmt: NumberFormat, dtype: torch.dtype) -> "Rounding":
        """Return the rounding of values of a dtype to a format as the kernels take it."""
        return Rounding(
            format=describe_format(fmt, fmt.min),
            dtype=DTYPES[dtype],
            rule=RULES.index(self.kind),
            scales=describe_format(self.fmt, self.least),
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

    @property
    def struct(self) -> "_Tokens":
        """The tokens as the kernels take them."""
        _, m, k = self.numbers.shape
        return _Tokens(
            m,
            k,
            k // self.scale.shape[1],
            self.grid.planes,
            self.grid.offset,
            self.numbers.data_ptr(),
            self.scale.data_ptr(),
            address(self.zero),
        )


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
            address(self.table_index),
            self.scales.data_ptr(),
            address(self.scale_values),
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


class Rounding(ctypes.Structure):
    """A number format, and where its scales come from, as the kernels take it."""

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


@lru_cache
def describe_format(fmt: NumberFormat | None, least: float) -> _Format:
    """Return a number format as the kernels take it; None stands for fp32."""
    if fmt is None:
        return _Format(largest=math.inf, least=least)
    floor, shift = math.ldexp(1.0, fmt.min_exponent), math.ldexp(1.5, 23 - fmt.mantissa)
    return _Format(floor, shift, fmt.smallest, fmt.max, least)


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's values, or None."""
    return None if tensor is None else tensor.data_ptr()
