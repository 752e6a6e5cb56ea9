"""What is kept of an activation while calibration calls flow by, to choose its static scales from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Observer(Protocol):
    """Notes a little of each call, and makes one tensor of all notes."""

    def note(self, x: Float[Tensor, "..."]) -> Tensor: ...
    def gather(self, notes: Sequence[Tensor]) -> Tensor: ...


def spread(n: int, count: int) -> Int[Tensor, "m"]:
    """At most `count` of n places, ascending: multiples of the golden ratio. They are evenly spread and, other than
    every kth place, in step with nothing, be it the channels of a token or the tokens of an image."""
    if n <= count:
        return torch.arange(n)
    return (torch.arange(1, count + 1, dtype=torch.float64) * (5**0.5 - 1) / 2 % 1 * n).long().unique()


@dataclass(frozen=True)
class Sample:
    """At most `count` values of each call, evenly spread, and its two `extremes` if scales are chosen by range.

    Among so few the extremes count for thousands of values each: percentiles and errors are not to be taken of them.
    """

    count: int = 1024
    extremes: bool = True

    def note(self, x: Float[Tensor, "..."]) -> Float[Tensor, "c"]:
        flat = x.flatten()
        some = flat[spread(len(flat), self.count).to(flat.device)]
        ends = [flat.min()[None], flat.max()[None]] if self.extremes else []
        return torch.cat([some, *ends]).float().cpu()

    def gather(self, notes: Sequence[Tensor]) -> Float[Tensor, "n"]:
        return torch.cat(list(notes))


@dataclass(frozen=True)
class MovingRange:
    """The two extremes, as moving averages over the calls in their order (Q-Diffusion, arXiv:2302.04304)."""

    momentum: float = 0.95

    def note(self, x: Float[Tensor, "..."]) -> Float[Tensor, "2"]:
        return torch.stack([x.min(), x.max()]).float().cpu()

    def gather(self, notes: Sequence[Tensor]) -> Float[Tensor, "2"]:
        return reduce(lambda kept, new: self.momentum * kept + (1 - self.momentum) * new, notes)


@dataclass(frozen=True)
class ChannelRange:
    """The extremes of each input channel, for scales that differ by channel; and at most `tokens` tokens of each call,
    evenly spread, for what depends on more than extremes, as the choice of a format does."""

    tokens: int = 0

    def note(self, x: Float[Tensor, "..."]) -> Float[Tensor, "n k"]:
        tokens = x.reshape(-1, x.shape[-1])
        some = tokens[spread(len(tokens), self.tokens).to(x.device)] if self.tokens else tokens[:0]
        return torch.cat([extremes(tokens), some]).float().cpu()

    def gather(self, notes: Sequence[Tensor]) -> Float[Tensor, "n k"]:
        return torch.cat([extremes(torch.cat([note[:2] for note in notes])), *(note[2:] for note in notes)])


def extremes(tokens: Float[Tensor, "n k"]) -> Float[Tensor, "2 k"]:
    """The least and the largest value of each channel."""
    return torch.stack([tokens.amin(0), tokens.amax(0)])
