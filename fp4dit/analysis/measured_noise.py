"""Squared error of rounding to nearest, measured with a quantizer on samples and on weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.analysis.distributions import Distribution
from fp4dit.numerics.quantizer import Granularity, Quantizer

Weight = Float[Tensor, "o k"]


@dataclass(frozen=True)
class Estimate:
    """The mean of independent measurements, with its standard error.

    Attributes:
        mean: The mean.
        error: The standard error of the mean.
    """

    mean: float
    error: float


def to_decibels(noise: float) -> float:
    """Return the ratio of signal to noise in dB of a squared error relative to the variance.

    >>> to_decibels(0.01)
    20.0
    """
    return -10 * math.log10(noise)


def sample_noise(
    quantizer: Quantizer,
    distribution: Distribution,
    shape: tuple[int, int],
    tensors: int,
    seed: int = 0,
) -> Estimate:
    """Return the squared error of a value of a random tensor, as a share of the variance.

    Args:
        quantizer: The quantizer; its format may be a selection.
        distribution: The distribution of the values.
        shape: The shape of a tensor.
        tensors: The number of independent tensors, 2 or more, from which the standard error comes.
        seed: The seed of the values.

    Example:
        >>> sample_noise(Quantizer(floating(2, 1), PerGroup(16)), Uniform(), (64, 64), tensors=20)
        Estimate(mean=0.00..., error=...)
    """
    rng = np.random.default_rng(seed)
    noise = []
    for _ in range(tensors):
        x = torch.from_numpy(distribution.sample(shape, rng)).float()
        noise.append(measure_noise(quantizer, x) / x.numel())
    return Estimate(float(np.mean(noise)), float(np.std(noise, ddof=1) / math.sqrt(tensors)))


def measure_noise(quantizer: Quantizer, weight: Weight) -> float:
    """Return the sum of the squared errors of rounding a weight to nearest."""
    rounded = quantizer.resolve_format(weight)(weight)
    return (rounded - weight).square().sum(dtype=torch.float64).item()


def measure_signal_to_noise(
    quantizers: Mapping[str, Quantizer], weight: Weight
) -> dict[str, float]:
    """Return the ratio of signal to noise in dB that each quantizer leaves of a weight.

    Example:
        >>> measure_signal_to_noise({"int4": Quantizer(integer(4), PerGroup(128))}, weight)
        {'int4': 18.9...}
    """
    power = weight.square().sum(dtype=torch.float64).item()
    ratios = {}
    for name, quantizer in quantizers.items():
        ratios[name] = to_decibels(measure_noise(quantizer, weight) / power)
    return ratios


def measure_kurtosis(granularity: Granularity, weight: Weight) -> float:
    """Return the excess kurtosis of a weight about 0, each block divided by its root mean square.

    For n independent normal values, the fourth moment over the squared second one is 3n / (n + 2)
    on average. The factor (n + 2) / n makes their kurtosis 0 for blocks of any size.
    """
    blocks = granularity.split(weight).double()
    n = blocks.shape[1]
    ratios = (blocks**4).mean(1) / (blocks**2).mean(1).clamp(min=1e-300) ** 2
    return ratios.mean().item() * (n + 2) / n - 3
