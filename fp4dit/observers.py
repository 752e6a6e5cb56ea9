"""What is kept of an activation while calibration calls flow by, to choose its static scales from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Observer(Protocol):
    """Notes a little of each call, and makes one tensor of all notes."""

    def note(self, x: Float[Tensor, "..."]) -> Tensor: ...
    def gather(self, notes: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Sample:
    """About `count` values of each call, evenly spaced in memory, and its two extremes."""

    count: int = 1024

    def note(self, x: Float[Tensor, "..."]) -> Float[Tensor, "c"]:
        flat = x.flatten()
        return torch.cat([flat[:: max(1, len(flat) // self.count)], flat.min()[None], flat.max()[None]]).float().cpu()

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
    """The extremes of each input channel, for scales that differ by channel."""

    def note(self, x: Float[Tensor, "..."]) -> Float[Tensor, "2 k"]:
        tokens = x.reshape(-1, x.shape[-1])
        return torch.stack([tokens.amin(0), tokens.amax(0)]).float().cpu()

    def gather(self, notes: Sequence[Tensor]) -> Float[Tensor, "2 k"]:
        low, high = torch.stack(list(notes)).unbind(1)
        return torch.stack([low.amin(0), high.amax(0)])
