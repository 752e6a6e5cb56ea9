"""Ranges of blocks that are learned: tuned scales and zero points, rounded as they are stored."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch

from fp4dit.numerics.block_scales import E4M3, E8M0Scale, ExponentRule, floor_exponent
from fp4dit.numerics.formats import Format, NumberFormat, floating
from fp4dit.numerics.qparams import Affine, Blocks, PerBlock, QParams, Scale, TwoSided
from fp4dit.numerics.scale_rules import AbsMax, MinMax, TwoSidedAbsMax, round_scale
from fp4dit.rounding.straight_through import straight_through

ScaleRounding = Callable[[PerBlock, PerBlock], PerBlock]


def round_scale_to_format(
    scale: PerBlock, initial: PerBlock, fmt: NumberFormat | None = None
) -> PerBlock:
    """Return a tuned scale in a number format.

    Args:
        scale: Tuned scale of each block.
        initial: Calibrated scale of each block, which is ignored.
        fmt: Format, such as fp16, or unsigned E8M0 for a power of two; None keeps fp32.
    """
    return round_scale(scale, fmt)


def round_scale_to_tensor_units(
    scale: PerBlock, initial: PerBlock, fmt: NumberFormat = E4M3
) -> PerBlock:
    """Return a tuned scale rounded as NVFP4 stores it: a number in `fmt` times a unit per tensor.

    The unit makes the largest calibrated scale the largest value of `fmt`.
    """
    unit = initial.amax() / fmt.max
    return round_scale(scale / unit, fmt) * unit


def round_scale_to_power_of_two(
    scale: PerBlock,
    initial: PerBlock,
    fmt: Format = floating(2, 1),
    exponents: ExponentRule = floor_exponent,
) -> PerBlock:
    """Return a tuned scale rounded as MX formats store it: a power of two.

    Args:
        scale: Tuned scale of each block.
        initial: Calibrated scale of each block, which is ignored.
        fmt: Format of the values.
        exponents: Rule that chooses the exponent for a reach of `scale` times the largest value.
    """
    reach = scale * fmt.max
    return E8M0Scale().make_scale(reach, exponents(reach, fmt)).scale


@singledispatch
def measure_qparams(qparams, weight: Blocks, fmt: Format) -> QParams:
    """Return qparams of the whole range of each block, of the class of `qparams`, not rounded.

    Raises:
        ValueError: If this is not defined for the class of `qparams`.
    """
    raise ValueError(
        f"the range of a {type(qparams).__name__} is not measured: set whole_range to false"
    )


@measure_qparams.register
def measure_symmetric_range(qparams: Scale, weight: Blocks, fmt: Format) -> QParams:
    """Return the scale of the largest magnitude."""
    return AbsMax()(weight, fmt)


@measure_qparams.register
def measure_two_sided_range(qparams: TwoSided, weight: Blocks, fmt: Format) -> QParams:
    """Return the scales of the largest and of the least value."""
    return TwoSidedAbsMax()(weight, fmt)


@measure_qparams.register
def measure_affine_range(qparams: Affine, weight: Blocks, fmt: Format) -> QParams:
    """Return the scale of the range that holds all values and 0, and a zero point that is real."""
    scale = MinMax()(weight, fmt).scale
    return Affine(scale, fmt.min - weight.amin(1, keepdim=True).clamp(max=0) / scale)


def round_tuned_scale(
    scale: PerBlock, exact: PerBlock, calibrated: PerBlock, scale_rounding: ScaleRounding
) -> PerBlock:
    """Return the rounded scale with a straight-through gradient.

    The calibrated scale is returned where the tuned one equals `exact`.
    """
    rounded = scale_rounding(scale.detach(), calibrated)
    return straight_through(scale, torch.where(scale == exact, calibrated, rounded))


@singledispatch
def shrink_range(
    exact,
    calibrated: Any,
    low: PerBlock,
    high: PerBlock,
    fmt: Format,
    scale_rounding: ScaleRounding,
) -> QParams:
    """Return qparams with the ends of the range times `low` and `high`, with gradients to both.

    Args:
        exact: Qparams of the range that factors of 1 stand for, which need not be rounded.
        calibrated: Qparams of this range as they are stored.
        low: Factor of the negative, or lower, end of each block's range.
        high: Factor of the positive, or upper, end.
        fmt: Number format of the values.
        scale_rounding: Rounds the scales.

    Raises:
        ValueError: If this is not defined for the class of `exact`.
    """
    raise ValueError(
        f"the range of a {type(exact).__name__} cannot be learned: set scale_rounding to null"
    )


@shrink_range.register
def shrink_symmetric_range(
    exact: Scale,
    calibrated: Scale,
    low: PerBlock,
    high: PerBlock,
    fmt: Format,
    scale_rounding: ScaleRounding,
) -> QParams:
    """Return a smaller scale. Both ends of a symmetric range shrink by `high`."""
    tuned = exact.scale * high
    return Scale(round_tuned_scale(tuned, exact.scale, calibrated.scale, scale_rounding))


@shrink_range.register
def shrink_two_sided_range(
    exact: TwoSided,
    calibrated: TwoSided,
    low: PerBlock,
    high: PerBlock,
    fmt: Format,
    scale_rounding: ScaleRounding,
) -> QParams:
    """Return smaller scales of the positive and of the negative values."""
    sides = []
    for side, factor in (("positive", high), ("negative", low)):
        whole, stored = getattr(exact, side), getattr(calibrated, side)
        sides.append(round_tuned_scale(whole * factor, whole, stored, scale_rounding))
    return TwoSided(*sides)


@shrink_range.register
def shrink_affine_range(
    exact: Affine,
    calibrated: Affine,
    low: PerBlock,
    high: PerBlock,
    fmt: Format,
    scale_rounding: ScaleRounding,
) -> QParams:
    """Return a smaller scale, and the zero point that belongs to the new ends of the range."""
    # In units of the exact scale, the new scale is 1 if the range does not shrink. It is exactly 1
    # without a real zero point, with which the sum of both ends may be rounded.
    bottom, top = (fmt.min - exact.zero) * low, (fmt.max - exact.zero) * high
    relative_scale = (top - bottom) / (fmt.max - fmt.min)
    tuned = exact.scale * relative_scale
    scale = round_tuned_scale(tuned, exact.scale, calibrated.scale, scale_rounding)
    zero = fmt.min - bottom * exact.scale / scale
    return Affine(scale, straight_through(zero, zero.round().clamp(fmt.min, fmt.max)))
