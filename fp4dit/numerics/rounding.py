"""Rounding of values on the grid of a format: to nearest, or at random."""

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.formats import Format

RoundingFunction = Callable[[Float[Tensor, "*n"], Format], Float[Tensor, "*n"]]


def round_to_nearest(x: Float[Tensor, "*n"], fmt: Format) -> Float[Tensor, "*n"]:
    """Round `x` to the nearest value of the format, ties to even."""
    return fmt.nearest(x)


@dataclass(frozen=True)
class StochasticRounding:
    """Rounding up or down at random, without bias: the expected result is the value.

    The choices depend only on the seed and the values, so a resumed run makes the same ones.

    Args:
        seed: Seed of the choices.

    Example:
        >>> StochasticRounding(seed=1)(torch.full((4,), 0.75), floating(2, 1))  # each 0.5 or 1.0
    """

    seed: int = 0

    def __call__(self, x: Float[Tensor, "*n"], fmt: Format) -> Float[Tensor, "*n"]:
        content = x.detach().clamp(fmt.min, fmt.max).float().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(crc32(content, self.seed))
        return round_stochastically(x, fmt, torch.rand(x.shape, generator=generator).to(x))


def round_stochastically(
    x: Float[Tensor, "*n"], fmt: Format, draw: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """Return the outer neighbor of `x` with a probability of its distance from the inner one.

    Args:
        draw: Uniform random numbers in [0, 1).
    """
    inner, outer = fmt.bracket(x)
    x = x.clamp(fmt.min, fmt.max)
    return torch.where(draw * (outer - inner).abs() < (x - inner).abs(), outer, inner)
