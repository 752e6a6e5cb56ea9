"""Weights of the errors of denoising steps, by what an error at each step does to the image."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.utils.errors import UserError


@runtime_checkable
class WeightRows(Protocol):
    """Protocol of functions from the timesteps of rows to the weights of their squared errors.

    Example:
        >>> weigh: WeightRows = TimestepWeights([0, 1000], [2.0, 0.5])
    """

    def __call__(self, timestep: Float[Tensor, "n"]) -> Float[Tensor, "n"]: ...


@dataclass(frozen=True)
class TimestepWeights:
    """Weights that are given for some timesteps, and interpolated linearly between them.

    They are divided by their mean over the given timesteps, so that only their ratios matter.

    Args:
        timesteps: The timesteps, rising.
        weights: The weight of each, such as `python -m benchmarks.step_sensitivity` measures.

    Example:
        >>> weigh = TimestepWeights([0, 1000], [3.0, 1.0])
        >>> weigh(torch.tensor([0.0, 500.0]))
        tensor([1.5000, 1.0000])
    """

    timesteps: Sequence[float | int]
    weights: Sequence[float | int]

    def __post_init__(self) -> None:
        steps, weights = list(self.timesteps), list(self.weights)
        rising = all(a < b for a, b in itertools.pairwise(steps))
        if not steps or len(steps) != len(weights) or not rising or min(weights) <= 0:
            raise UserError(
                "rounding.weigh_rows needs rising timesteps, and a positive weight for each; "
                f"{len(steps)} timesteps and {len(weights)} weights are given"
            )

    def __call__(self, timestep: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        known = torch.tensor(self.timesteps, dtype=torch.float32, device=timestep.device)
        weights = torch.tensor(self.weights, dtype=torch.float32, device=timestep.device)
        weights = weights / weights.mean()
        if len(known) == 1:
            return torch.ones_like(timestep)
        t = timestep.float().clamp(known[0], known[-1])
        right = torch.bucketize(t, known).clamp(1, len(known) - 1)
        share = (t - known[right - 1]) / (known[right] - known[right - 1])
        return torch.lerp(weights[right - 1], weights[right], share)
