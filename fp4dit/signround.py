"""SignRound (arXiv:2309.05516): learn a shift of each weight before it is rounded, and the range of each block."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fp4dit.blockscales import E4M3
from fp4dit.choice import Mixed
from fp4dit.formats import Format, NumberFormat
from fp4dit.rounding import Rounder
from fp4dit.scales import stored
from fp4dit.scaling import Affine, Blocks, Column, Scale, Scaling, TwoSided

Shift = Callable[[Blocks, Blocks, Format], Blocks]
Store = Callable[[Column, Column], Column]


def through(x: Float[Tensor, "*n"], value: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """`value` to the bit, with the gradient of `x` (a straight-through estimator)."""
    return value.detach() + (x - x.detach())


def within(x: Blocks, fmt: Format) -> Blocks:
    """Cuts off, and keeps from gradients, what would be rounded to beyond an end; what is rounded to it is inside."""
    low, high = (torch.as_tensor(end).to(x) for end in (fmt.min, fmt.max))
    return x.clamp(low - fmt.step(low) / 2, high + fmt.step(high) / 2)


def in_scale(x: Blocks, v: Blocks, fmt: Format) -> Blocks:
    """A shift by v units of the grid, as published: where steps are long it flips few weights, where short, several."""
    return within(x + v, fmt)


def in_ulp(x: Blocks, v: Blocks, fmt: Format) -> Blocks:
    """A shift by v of the local steps: every weight can reach the other one of its two neighbours, and no third."""
    x = within(x, fmt)
    inner, outer = fmt.bracket(x.detach())
    shifted = x + v * (outer - inner).abs()
    return through(shifted, torch.clamp(shifted, torch.minimum(inner, outer), torch.maximum(inner, outer)))


def in_format(scale: Column, measured: Column, fmt: NumberFormat | None = None) -> Column:
    """A tuned scale as it is kept in `fmt`: fp16, or unsigned E8M0 for a power of two; None keeps fp32."""
    return stored(scale, fmt)


def in_format_per_tensor(scale: Column, measured: Column, fmt: NumberFormat = E4M3) -> Column:
    """As NVFP4 keeps it, in units of a number of the tensor, of which the largest scale measured is `fmt.max`."""
    unit = measured.amax() / fmt.max
    return stored(scale / unit, fmt) * unit


class SignRound(Rounder):
    """Round w / s + v instead of w / s, |v| <= 1/2, with a straight-through gradient.

    As v starts at 0, nothing is moved before training. With a `store`, which says how scales are kept, each block also
    learns by which factors of `bounds` to draw in its range at the low and at the high end; the gradient passes the
    storing straight through. A range that is not drawn in keeps its scale to the bit. The weights are always hard, so
    that there is no indecision.
    """

    weight: Tensor

    def __init__(
        self,
        weight: Blocks,
        fmt: Format,
        scaling: Scaling,
        shift: Shift = in_scale,
        store: Store | None = None,
        bounds: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        super().__init__()
        self.format, self.shift, self.store, self.bounds = fmt, shift, store, bounds
        self.v = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("weight", weight, persistent=False)
        self.remember(scaling)
        if store is not None:
            self.low, self.high = (nn.Parameter(weight.new_ones(len(weight), 1)) for _ in range(2))

    def soft(self, beta: float | None = None, dtype: torch.dtype = torch.float32) -> tuple[Blocks, float]:
        """The hard weights, with gradients."""
        self.project()
        fmt, scaling = on(self.format, self.weight), self.drawn_in()
        x = self.shift(scaling.to_grid(self.weight), self.v, fmt)
        return scaling.from_grid(through(x, fmt.nearest(x.detach()))), 0.0

    @torch.no_grad()
    def hard(self) -> Blocks:
        return self.soft()[0]

    @property
    @torch.no_grad()
    def scaling(self) -> Scaling | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What to keep instead of the scaling measured, if that is learnt."""
        return None if self.store is None else self.drawn_in()

    @property
    def count(self) -> int:
        return self.v.numel()

    @torch.no_grad()
    def project(self) -> None:
        """Back to where the parameters may be: a clamp in the graph would stop the gradient at its edge for good."""
        self.v.clamp_(-0.5, 0.5)
        if self.store is not None:
            self.low.clamp_(*self.bounds)
            self.high.clamp_(*self.bounds)

    def drawn_in(self) -> Scaling:
        if self.store is None:
            return self.measured
        return drawn_in(self.measured, self.low, self.high, on(self.format, self.weight), self.store)


def on(fmt: Format, x: Tensor) -> Format:
    """The format on the device of `x`: one that differs by block holds a tensor, which no module moves."""
    return replace(fmt, index=fmt.index.to(x.device)) if isinstance(fmt, Mixed) else fmt


def kept(scale: Column, measured: Column, store: Store) -> Column:
    return through(scale, torch.where(scale == measured, measured, store(scale.detach(), measured)))


@singledispatch
def drawn_in(scaling, low: Column, high: Column, fmt: Format, store: Store) -> Scaling:
    """The scaling whose range ends at `low` and `high` times what it does, stored, with gradients to both factors.

    Raises:
        ValueError: if nobody said how for this kind of scaling.
    """
    raise ValueError(f"the range of a {type(scaling).__name__} cannot be learnt: give no store")


@drawn_in.register
def _(scaling: Scale, low: Column, high: Column, fmt: Format, store: Store) -> Scaling:
    return Scale(kept(scaling.scale * high, scaling.scale, store))


@drawn_in.register
def _(scaling: TwoSided, low: Column, high: Column, fmt: Format, store: Store) -> Scaling:
    positive = kept(scaling.positive * high, scaling.positive, store)
    return TwoSided(positive, kept(scaling.negative * low, scaling.negative, store))


@drawn_in.register
def _(scaling: Affine, low: Column, high: Column, fmt: Format, store: Store) -> Scaling:
    # In steps of the measured scale, which are 1 long exactly where nothing is drawn in.
    bottom, top = (fmt.min - scaling.zero) * low, (fmt.max - scaling.zero) * high
    steps = (top - bottom) / (fmt.max - fmt.min)
    zero = fmt.min - bottom / steps
    scale = kept(scaling.scale * steps, scaling.scale, store)
    return Affine(scale, through(zero, zero.round().clamp(fmt.min, fmt.max)))


class SignSGD(Optimizer):
    """p -= lr * sign(gradient)"""

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
    """From the full learning rate down to 0 after `steps`: all together move a parameter by up to lr * steps / 2."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
