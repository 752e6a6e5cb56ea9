"""Observers, which summarize activations during calibration to compute static qparams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Observer(Protocol):
    """Protocol of observers, which summarize each call and merge the summaries.

    Example:
        >>> class LargestObserver:
        ...     def summarize(self, x):
        ...         return x.abs().max().reshape(1).float().cpu()
        ...
        ...     def merge(self, summaries):
        ...         return torch.cat(list(summaries))
        >>> rule = Rule("*.ff.*", quantizer, observer=LargestObserver())
    """

    def summarize(self, x: Float[Tensor, "..."]) -> Tensor:
        """Return a small summary of the activation `x` of one call, on the CPU."""
        ...

    def merge(self, summaries: Sequence[Tensor]) -> Tensor:
        """Return the tensor to calibrate on, from the summaries in the order of the calls."""
        ...


def spread_indices(n: int, count: int) -> Int[Tensor, "m"]:
    """Return at most `count` indices below n, ascending and evenly spread.

    The indices are n times the fractional parts of multiples of the golden ratio. Every k-th index
    could instead be the same channel of each token, or the same column of each image.
    """
    if n <= count:
        return torch.arange(n)
    fractions = torch.arange(1, count + 1, dtype=torch.float64) * (5**0.5 - 1) / 2 % 1
    return (fractions * n).long().unique()


@dataclass(frozen=True)
class SampleObserver:
    """Observer that keeps evenly spread values of each call.

    Args:
        count: Largest number of values per call.
        extremes: Keep the two extremes of each call too, for scales chosen by range. Percentiles
            and mean errors need `extremes=False`, because among so few values the extremes would
            count for thousands of values each.

    Example:
        >>> observer = SampleObserver(count=1024)
        >>> observer.merge([observer.summarize(x) for x in calls]).ndim
        1
    """

    count: int = 1024
    extremes: bool = True

    def summarize(self, x: Float[Tensor, "..."]) -> Float[Tensor, "c"]:
        flat = x.flatten()
        values = flat[spread_indices(len(flat), self.count).to(flat.device)]
        if self.extremes:
            values = torch.cat([values, flat.min()[None], flat.max()[None]])
        return values.float().cpu()

    def merge(self, summaries: Sequence[Tensor]) -> Float[Tensor, "n"]:
        return torch.cat(list(summaries))


@dataclass(frozen=True)
class MovingAverageMinMaxObserver:
    """Observer of the minimum and maximum, averaged over calls (Q-Diffusion, arXiv:2302.04304).

    Args:
        momentum: Weight of the average so far. The average starts at the first call.

    Example:
        >>> observer = MovingAverageMinMaxObserver(momentum=0.95)
        >>> low, high = observer.merge([observer.summarize(x) for x in calls])
    """

    momentum: float = 0.95

    def summarize(self, x: Float[Tensor, "..."]) -> Float[Tensor, "2 ..."]:
        return torch.stack([x.min(), x.max()]).float().cpu()

    def merge(self, summaries: Sequence[Tensor]) -> Float[Tensor, "2 ..."]:
        average = summaries[0]
        for summary in summaries[1:]:
            average = self.momentum * average + (1 - self.momentum) * summary
        return average


@dataclass(frozen=True)
class MovingAveragePartsObserver(MovingAverageMinMaxObserver):
    """`MovingAverageMinMaxObserver` of each of several equal parts of a row, for `PartScales`.

    Args:
        momentum: Weight of the average so far. The average starts at the first call.
        parts: Number of parts, which divides the length of a row.

    Example:
        >>> observer = MovingAveragePartsObserver(parts=2)
        >>> observer.merge([observer.summarize(torch.randn(2, 16, 64))]).shape
        torch.Size([2, 64])
    """

    parts: int = 2

    def summarize(self, x: Float[Tensor, "..."]) -> Float[Tensor, "2 ..."]:
        rows = x.reshape(-1, self.parts, x.shape[-1] // self.parts)
        ends = torch.stack([rows.amin((0, 2)), rows.amax((0, 2))])
        return ends.repeat_interleave(rows.shape[2], 1).float().cpu()


@dataclass(frozen=True)
class PerChannelMinMaxObserver:
    """Observer of the minimum and maximum of each channel, for scales per channel.

    Args:
        tokens: Largest number of tokens of each call to keep besides, evenly spread, for choices
            that depend on more than the extremes, such as the selection of a format. They follow
            the minimum and the maximum in the result of `merge`.

    Example:
        >>> observer = PerChannelMinMaxObserver()
        >>> observer.merge([observer.summarize(torch.randn(2, 16, 64))]).shape
        torch.Size([2, 64])
    """

    tokens: int = 0

    def summarize(self, x: Float[Tensor, "..."]) -> Float[Tensor, "n k"]:
        tokens = x.reshape(-1, x.shape[-1])
        sampled = tokens[spread_indices(len(tokens), self.tokens).to(x.device)]
        return torch.cat([channel_min_max(tokens), sampled]).float().cpu()

    def merge(self, summaries: Sequence[Tensor]) -> Float[Tensor, "n k"]:
        ranges = torch.cat([summary[:2] for summary in summaries])
        tokens = torch.cat([summary[2:] for summary in summaries])
        return torch.cat([channel_min_max(ranges), tokens])


def channel_min_max(tokens: Float[Tensor, "n k"]) -> Float[Tensor, "2 k"]:
    """Return the minimum and the maximum of each channel, as two rows."""
    return torch.stack([tokens.amin(0), tokens.amax(0)])
