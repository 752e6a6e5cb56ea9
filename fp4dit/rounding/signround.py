"""SignRound (AutoRound, arXiv:2309.05516).

It learns a shift of each weight before rounding, and optionally the range of each block, by signed
gradient descent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fp4dit.numerics.format_selection import PerBlockFormat
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams
from fp4dit.quantization.learnable_rounding import LearnableRounding
from fp4dit.rounding.learned_range import ScaleRounding, measure_qparams, shrink_range
from fp4dit.rounding.straight_through import straight_through

ShiftFunction = Callable[[Blocks, Blocks, Format], Blocks]


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
        whole_range: Whether the calibrated range is that of all values of a block. Its ends are
            then measured in place of taken from a stored scale, so that a tuned scale is rounded
            once, as in AutoRound's code.

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
        bounds: Sequence[float] = (0.5, 1.0),
        whole_range: bool = False,
    ) -> None:
        super().__init__()
        self.whole_range = whole_range
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
        fmt, calibrated = format_to(self.format, self.weight), self.initial_qparams
        exact = measure_qparams(calibrated, self.weight, fmt) if self.whole_range else calibrated
        return shrink_range(
            exact, calibrated, self.low_factor, self.high_factor, fmt, self.scale_rounding
        )


def format_to(fmt: Format, x: Tensor) -> Format:
    """Return the format on the device of `x`.

    A `PerBlockFormat` holds a tensor that is no buffer, so `Module.to` does not move it.
    """
    if isinstance(fmt, PerBlockFormat):
        return replace(fmt, format_index=fmt.format_index.to(x.device))
    return fmt


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
