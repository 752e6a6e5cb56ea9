"""How sure a mean is, and whether two means differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, bootstrap


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean; Wilson's interval where all values are 0 or 1."""
    data = np.asarray(values, dtype=np.float64)
    if set(data) <= {0.0, 1.0}:
        found = binomtest(int(data.sum()), len(data)).proportion_ci(method="wilson")
        return Interval(float(data.mean()), float(found.low), float(found.high))
    return resampled(data, seed)


def difference(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Interval:
    """How much larger `values` are than `others`, pair by pair: percentile bootstrap of the mean of the differences.

    Also for values of 0 and 1. Of a single pair nothing can be said: its interval has no ends.

    Raises:
        ValueError: if they are no pairs.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values cannot be paired with {len(others)}")
    data = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    return resampled(data, seed) if len(data) > 1 else Interval(float(data.mean()), -inf, inf)


def resampled(data: Float[np.ndarray, " n"], seed: int) -> Interval:
    mean = float(data.mean())
    if len(set(data)) == 1:
        return Interval(mean, mean, mean)
    found = bootstrap((data,), np.mean, method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
