"""Scale rules: how the scale of each block is chosen, and in which format it is kept.

A scale rule is called with the blocks of a tensor and a number format, and returns `QParams`.
The rules of this module compute one answer; those of `scale_search` wrap other rules and search;
those of `block_scales` have the 8-bit scales of MX formats and NVFP4.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.formats import Format, NumberFormat
from fp4dit.numerics.qparams import (
    Affine,
    Blocks,
    Offset,
    PerBlock,
    QParams,
    QParamsT,
    Scale,
    TwoSided,
    merge_qparams,
)

Importance = Float[Tensor, "#blocks block"]  # the weight of each value's error


@runtime_checkable
class ScaleRule(Protocol):
    """A rule that chooses the qparams of each block.

    Example:
        >>> AbsMax()(torch.tensor([[1.0, -3.0]]), floating(2, 1))
        Scale(scale=tensor([[0.5000]]))
    """

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> QParams:
        """Return the qparams of each block.

        Args:
            blocks: The values, one block a row.
            fmt: The number format.
            importance: Weights of the errors that a search minimizes. Other rules ignore it.
        """
        ...

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        """Return the bits that the qparams of a tensor of so many blocks take in storage."""
        ...


@runtime_checkable
class TensorScaleRule(Protocol):
    """A scale rule whose answers for a tensor's blocks depend on the whole tensor.

    Example:
        >>> rule = NVFP4Scale().with_tensor_scale_of(blocks)
        >>> qparams = rule(blocks[:4], floating(2, 1))  # as these blocks have in the whole tensor
    """

    def with_tensor_scale_of(self, blocks: Blocks) -> ScaleRule:
        """Return the rule with what depends on the whole tensor taken from these blocks."""
        ...


def fix_tensor_scale(rule: ScaleRule, blocks: Blocks) -> ScaleRule:
    """Return a rule that answers parts or multiples of `blocks` on the same scale grid."""
    return rule.with_tensor_scale_of(blocks) if isinstance(rule, TensorScaleRule) else rule


@runtime_checkable
class UnsignedScaleRule(Protocol):
    """A scale rule that may store positive scales in a format with a sign bit.

    Example:
        >>> NVFP4Scale().has_free_sign_bit  # of the E4M3 scale of a block
        True
    """

    @property
    def has_free_sign_bit(self) -> bool:
        """Whether the sign bit of a stored scale is always 0, and can say something else."""
        ...


def has_free_sign_bit(rule: ScaleRule) -> bool:
    """Return whether the sign bit of each stored scale can say which of two formats a block has."""
    return isinstance(rule, UnsignedScaleRule) and rule.has_free_sign_bit


def round_scale(scale: PerBlock, dtype: NumberFormat | None) -> PerBlock:
    """Round scales to the format they are kept in; never to 0, so that zeros stay zeros."""
    if dtype is None:
        return scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return dtype.nearest(scale).clamp(min=dtype.smallest)


def scale_bits(dtype: NumberFormat | None) -> float:
    """Return the bits of one scale; None is fp32."""
    return float(dtype.bits) if dtype else 32.0


def quantize_blocks(blocks: Blocks, qparams: QParams, fmt: Format) -> Blocks:
    """Fake-quantize blocks, rounding to nearest."""
    return qparams.from_grid(fmt.nearest(qparams.to_grid(blocks)))


def quantization_error(
    blocks: Blocks,
    qparams: QParams,
    fmt: Format,
    p: float = 2.0,
    importance: Importance | None = None,
) -> PerBlock:
    """Return each block's sum of importance * |Q(x) - x|^p."""
    # In place, because new memory costs more than the arithmetic.
    difference = quantize_blocks(blocks, qparams, fmt).sub_(blocks)
    power = difference.square_() if p == 2 else difference.abs_().pow_(p)
    return (power if importance is None else power * importance).sum(1, keepdim=True)


def select_least_error(
    blocks: Blocks,
    fmt: Format,
    candidates: Iterable[QParamsT],
    p: float = 2.0,
    importance: Importance | None = None,
) -> QParamsT:
    """Return, block by block, the candidate with the least error; among equals the first.

    Candidates are drawn one at a time, so an iterator of many needs little memory. The error of a
    single candidate is not computed.
    """
    candidates = iter(candidates)
    best, least = next(candidates), None
    for candidate in candidates:
        if least is None:
            least = quantization_error(blocks, best, fmt, p, importance)
        error = quantization_error(blocks, candidate, fmt, p, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = merge_qparams(better, candidate, best)
    return best


@dataclass(frozen=True)
class AbsMax:
    """The smallest symmetric scale that clips nothing: max|x| / the largest value of the format.

    Kept in fp16, a scale may be too small by 2^-11 of itself, and clip by as much.

    Attributes:
        dtype: The format that the scale is kept in; None is fp32.

    Example:
        >>> AbsMax()(torch.tensor([[3.0, -12.0]]), floating(2, 1)).scale
        tensor([[2.]])
    """

    dtype: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        magnitude = blocks.abs().amax(1, keepdim=True)
        # Divide by a tensor: to divide by a Python number, a GPU multiplies with the reciprocal,
        # and the last bit of the quotient may differ.
        largest = fmt.max
        if not isinstance(largest, Tensor):
            largest = torch.full_like(magnitude[:1], largest)
        return Scale(round_scale(magnitude / largest, self.dtype))

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return scale_bits(self.dtype) * blocks


@dataclass(frozen=True)
class StandardDeviations:
    """A clipping range of `count` population standard deviations of each block.

    2.92247856 has the least squared error for Gaussian values in E2M1 (arXiv:2505.14669, section
    4). For a constant block, whose deviation is a rounding error, the range is its value.

    Attributes:
        count: Half the width of the range, in standard deviations.

    Example:
        >>> StandardDeviations(2.0)(torch.tensor([[-1.0, 1.0]]))
        tensor([[2.]])
    """

    count: float = 2.92247856

    def __call__(self, blocks: Blocks) -> PerBlock:
        deviation = blocks.std(1, correction=0, keepdim=True)
        largest = blocks.abs().amax(1, keepdim=True)
        constant = largest * (8 * torch.finfo(blocks.dtype).eps)
        # A NaN in the deviation makes the sum NaN.
        return torch.where(deviation > constant, self.count * deviation, largest + deviation)


@dataclass(frozen=True)
class RootMeanSquares:
    """A clipping range of `count` root mean squares of each block (QuEST, arXiv:2502.05003).

    As `StandardDeviations`, but about 0 and not about the mean: values that are all far from zero
    are not clipped.

    Attributes:
        count: Half the width of the range, in root mean squares.

    Example:
        >>> RootMeanSquares(2.0)(torch.tensor([[3.0, 3.0]]))
        tensor([[6.]])
    """

    count: float = 2.92247856

    def __call__(self, blocks: Blocks) -> PerBlock:
        reach = self.count * blocks.square().mean(1, keepdim=True).sqrt_()
        # The squares may be too small for fp32.
        return torch.where(reach == 0, blocks.abs().amax(1, keepdim=True), reach)


@dataclass(frozen=True)
class TwoSidedAbsMax:
    """The smallest scale for each sign that clips nothing (AFPQ, arXiv:2311.01792).

    Attributes:
        dtype: The format that scales are kept in; None is fp32.

    Raises:
        ValueError: if the format is unsigned.

    Example:
        >>> TwoSidedAbsMax()(torch.tensor([[3.0, -12.0]]), floating(2, 1)).positive
        tensor([[0.5000]])
    """

    dtype: NumberFormat | None = None

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> TwoSided:
        if fmt.min >= 0:
            raise ValueError(
                f"{fmt.name} has no negative values to scale: use MinMax or OffsetRange"
            )
        high = blocks.amax(1, keepdim=True).clamp(min=0)
        low = blocks.amin(1, keepdim=True).clamp(max=0)
        return TwoSided(
            round_scale(high / fmt.max, self.dtype), round_scale(low / fmt.min, self.dtype)
        )

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return 2 * scale_bits(self.dtype) * blocks


@dataclass(frozen=True)
class MinMax:
    """The smallest affine range that holds all values and zero, which stays exact.

    The zero point is an integer, so one end may be clipped by up to half a step.

    Attributes:
        dtype: The format that the scale is kept in; None is fp32.

    Example:
        >>> MinMax()(torch.tensor([[0.0, 7.5]]), integer(4, signed=False)).scale
        tensor([[0.5000]])
    """

    dtype: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Affine:
        low = blocks.amin(1, keepdim=True).clamp(max=0)
        high = blocks.amax(1, keepdim=True).clamp(min=0)
        scale = round_scale((high - low) / (fmt.max - fmt.min), self.dtype)
        return Affine(scale, (fmt.min - low / scale).round().clamp(fmt.min, fmt.max))

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return (scale_bits(self.dtype) + fmt.bits) * blocks


@dataclass(frozen=True)
class OffsetRange:
    """The format's range laid over the block's range, from its least value up (arXiv:2505.21591).

    Zero may be inexact. An unsigned float is fine at the dense side of a one-sided block, as after
    a GELU.

    Attributes:
        dtype: The format that scale and offset are kept in; None is fp32.

    Example:
        >>> OffsetRange()(torch.tensor([[-1.0, 6.0]]), floating(3, 1, signed=False)).offset
        tensor([[-1.]])
    """

    dtype: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Offset:
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        scale = round_scale((high - low) / (fmt.max - fmt.min), self.dtype)
        offset = low - fmt.min * scale
        return Offset(scale, self.dtype.nearest(offset) if self.dtype else offset)

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return 2 * scale_bits(self.dtype) * blocks
