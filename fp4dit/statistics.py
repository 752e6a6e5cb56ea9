"""How sure a mean is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
    mean = float(data.mean())
    if set(data) <= {0.0, 1.0}:
        found = binomtest(int(data.sum()), len(data)).proportion_ci(method="wilson")
    elif len(set(data)) == 1:
        return Interval(mean, mean, mean)
    else:
        found = bootstrap((data,), np.mean, method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
