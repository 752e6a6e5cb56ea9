"""SignRound (AutoRound, arXiv:2309.05516).

It learns a shift of each weight before rounding, and optionally the range of each block, by signed
gradient descent.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.format_selection import PerBlockFormat
from fp4dit.numerics.formats import Format, NumberFormat
from fp4dit.numerics.qparams import Affine, Blocks, PerBlock, QParams, Scale, TwoSided
from fp4dit.numerics.scale_rules import round_scale
from fp4dit.quantization.learnable_rounding import LearnableRounding
from fp4dit.rounding.straight_through import straight_through

ShiftFunction = Callable[[Blocks, Blocks, Format], Blocks]

ScaleRounding = Callable[[PerBlock, PerBlock], PerBlock]


def clip_to_range(x: Blocks, fmt: Format) -> Blocks:
    """Clip grid values that would round to beyond an end of the format.

    Values that round to an end keep their gradient; those that are clipped have none.
    """
    low, high = torch.as_tensor(fmt.min).to(x), torch.as_tensor(fmt.max).to(x)
    return x.clamp(low - fmt.step(low) / 2, high + fmt.step(high) / 2)


def shift_in_scale_units(x: Blocks, v: Blocks, fmt: Format) -> Blocks:
    """Return grid values shifted by v in units of the scale, as in the paper.

    On a float grid this moves small weights by several levels and rarely flips large ones. See
    `shift_in_ulp`.
    """
    return clip_to_range(x + v, fmt)


def shift_in_ulp(x: Blocks, v: Blocks, fmt: Format) -> Blocks:
    """Return grid values shifted by v in units of the local step.

    Every weight can reach both of its neighbors on the grid, and no third value.
    """
    x = clip_to_range(x, fmt)
    inner, outer = fmt.bracket(x.detach())
    shifted = x + v * (outer - inner).abs()
    low, high = torch.minimum(inner, outer), torch.maximum(inner, outer)
    return straight_through(shifted, torch.clamp(shifted, low, high))


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


class SignRound(LearnableRounding):
    """SignRound: round w / s + v in place of w / s, with |v| <= 1/2 (arXiv:2309.05516).

    The gradient passes the rounding straight through. v starts at 0, so that before training the
    weight is rounded to nearest. With `scale_rounding`, each block also learns two factors by
    which its range shrinks at the low and at the high end. A range that does not shrink keeps its
    exact scale. The weight is always hard, so there is no rounding loss.

    Args:
        weight: Weight in blocks that share a scale.
        fmt: Number format.
        qparams: Calibrated qparams of the blocks.
        shift: Function that shifts grid values by v: `shift_in_scale_units` or `shift_in_ulp`.
        scale_rounding: Rounds a tuned scale to the format it is stored in. None: the range is not
            learned.
        bounds: Least and largest factor of a range.

    Example:
        >>> learner = partial(SignRound, shift=shift_in_ulp, scale_rounding=round_scale_to_format)
        >>> rounding = layer.start_learning(learner)
    """

    weight: Tensor

    def __init__(
        self,
        weight: Blocks,
        fmt: Format,
        qparams: QParams,
        shift: ShiftFunction = shift_in_scale_units,
        scale_rounding: ScaleRounding | None = None,
        bounds: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        super().__init__()
        self.format, self.shift = fmt, shift
        self.scale_rounding, self.bounds = scale_rounding, bounds
        self.v = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("weight", weight, persistent=False)
        self.register_initial_qparams(qparams)
        if scale_rounding is not None:
            self.low_factor = nn.Parameter(weight.new_ones(len(weight), 1))
            self.high_factor = nn.Parameter(weight.new_ones(len(weight), 1))

    def soft_weight(
        self, beta: float | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Blocks, float]:
        """Return the hard weight with a straight-through gradient, and no rounding loss."""
        self.clamp_parameters()
        fmt, qparams = format_to(self.format, self.weight), self.tuned_qparams()
        x = self.shift(qparams.to_grid(self.weight), self.v, fmt)
        return qparams.from_grid(straight_through(x, fmt.nearest(x.detach()))), 0.0

    @torch.no_grad()
    def hard_weight(self) -> Blocks:
        return self.soft_weight()[0]

    @property
    @torch.no_grad()
    def learned_qparams(self) -> QParams | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Qparams with the learned ranges; None if ranges are not learned."""
        return None if self.scale_rounding is None else self.tuned_qparams()

    @property
    def num_roundings(self) -> int:
        return self.v.numel()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Move the parameters back into their bounds.

        They are clamped in place, because a clamp in the autograd graph would give a parameter
        beyond its bound no gradient, so that it would never return.
        """
        self.v.clamp_(-0.5, 0.5)
        if self.scale_rounding is not None:
            self.low_factor.clamp_(*self.bounds)
            self.high_factor.clamp_(*self.bounds)

    def tuned_qparams(self) -> QParams:
        """Return the qparams with the current ranges, with gradients to their factors."""
        if self.scale_rounding is None:
            return self.initial_qparams
        return shrink_range(
            self.initial_qparams,
            self.low_factor,
            self.high_factor,
            format_to(self.format, self.weight),
            self.scale_rounding,
        )


def format_to(fmt: Format, x: Tensor) -> Format:
    """Return the format on the device of `x`.

    A `PerBlockFormat` holds a tensor that is no buffer, so `Module.to` does not move it.
    """
    if isinstance(fmt, PerBlockFormat):
        return replace(fmt, format_index=fmt.format_index.to(x.device))
    return fmt


def round_tuned_scale(
    scale: PerBlock, initial: PerBlock, scale_rounding: ScaleRounding
) -> PerBlock:
    """Return the rounded scale with a straight-through gradient.

    A scale that equals the calibrated one is not rounded.
    """
    rounded = scale_rounding(scale.detach(), initial)
    return straight_through(scale, torch.where(scale == initial, initial, rounded))


@singledispatch
def shrink_range(
    qparams, low: PerBlock, high: PerBlock, fmt: Format, scale_rounding: ScaleRounding
) -> QParams:
    """Return qparams with the ends of the range times `low` and `high`, with gradients to both.

    Args:
        qparams: Calibrated qparams.
        low: Factor of the negative, or lower, end of each block's range.
        high: Factor of the positive, or upper, end.
        fmt: Number format of the values.
        scale_rounding: Rounds the scales.

    Raises:
        ValueError: If this is not defined for the class of `qparams`.
    """
    raise ValueError(
        f"the range of a {type(qparams).__name__} cannot be learned: set scale_rounding to null"
    )


@shrink_range.register
def shrink_symmetric_range(
    qparams: Scale, low: PerBlock, high: PerBlock, fmt: Format, scale_rounding: ScaleRounding
) -> QParams:
    """Return a smaller scale. Both ends of a symmetric range shrink by `high`."""
    return Scale(round_tuned_scale(qparams.scale * high, qparams.scale, scale_rounding))


@shrink_range.register
def shrink_two_sided_range(
    qparams: TwoSided, low: PerBlock, high: PerBlock, fmt: Format, scale_rounding: ScaleRounding
) -> QParams:
    """Return smaller scales of the positive and of the negative values."""
    positive = round_tuned_scale(qparams.positive * high, qparams.positive, scale_rounding)
    negative = round_tuned_scale(qparams.negative * low, qparams.negative, scale_rounding)
    return TwoSided(positive, negative)


@shrink_range.register
def shrink_affine_range(
    qparams: Affine, low: PerBlock, high: PerBlock, fmt: Format, scale_rounding: ScaleRounding
) -> QParams:
    """Return a smaller scale, and the zero point that belongs to the new ends of the range."""
    # In units of the calibrated scale, the new scale is exactly 1 if the range does not shrink.
    bottom, top = (fmt.min - qparams.zero) * low, (fmt.max - qparams.zero) * high
    relative_scale = (top - bottom) / (fmt.max - fmt.min)
    zero = fmt.min - bottom / relative_scale
    scale = round_tuned_scale(qparams.scale * relative_scale, qparams.scale, scale_rounding)
    return Affine(scale, straight_through(zero, zero.round().clamp(fmt.min, fmt.max)))


class SignSGD(Optimizer):
    """Signed gradient descent: p -= lr * sign(gradient).

    Args:
        params: Parameters.
        lr: Learning rate.

    Example:
        >>> optimizer = SignSGD(rounding.parameters(), lr=5e-3)
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


def linear_decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return a schedule from the full learning rate linearly down to 0 after `steps`.

    In total a parameter of `SignSGD` moves by at most lr * (steps + 1) / 2.
    """

    def remaining_share(step: int) -> float:
        return max(0.0, 1 - step / steps)

    return LambdaLR(optimizer, remaining_share)
