"""How sure a mean is, and which of many differences are real."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap, ttest_1samp

RESAMPLES = 9_999
MANY = 1_000  # values from which on Student's t and resampling agree, and t takes no time
AT_ONCE = 2**22  # numbers of resamples held in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """BCa bootstrap of the mean (Efron 1987); Wilson's interval where all values are 0 or 1.

    Values that are all alike, as a single one is, show no spread: their interval has no width.
    """
    data = np.asarray(values, dtype=np.float64)
    if set(data) <= {0.0, 1.0}:
        found = binomtest(int(data.sum()), len(data)).proportion_ci(method="wilson")
        return Interval(float(data.mean()), float(found.low), float(found.high))
    if np.ptp(data) == 0:
        return Interval(float(data[0]), float(data[0]), float(data[0]))
    return bootstrapped(data[None], seed)[0]


def difference(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Interval:
    """How much larger `values` are than `others`, pair by pair.

    Raises:
        ValueError: if they are no pairs.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values cannot be paired with {len(others)}")
    return intervals((np.asarray(values, np.float64) - np.asarray(others, np.float64))[None], seed)[0]


def intervals(data: Float[np.ndarray, "k n"], seed: int = 0) -> list[Interval]:
    """The mean of each row: BCa bootstrap, or Student's interval where there are MANY values.

    Of a single one nothing can be said: its interval has no ends.
    """
    means, n = data.mean(1), data.shape[1]
    if n == 1:
        return [Interval(float(mean), -inf, inf) for mean in means]
    if n < MANY:
        return bootstrapped(data, seed)
    ends = students(data).confidence_interval()
    low, high = (np.where(np.ptp(data, axis=1) == 0, means, end) for end in (ends.low, ends.high))
    return [Interval(*map(float, one)) for one in zip(means, low, high, strict=True)]


def students(data: Float[np.ndarray, "k n"]) -> Any:
    """scipy's t test of each row, nan where a row is constant."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows that are nearly so
        return ttest_1samp(data, 0.0, axis=1)


def bootstrapped(data: Float[np.ndarray, "k n"], seed: int) -> list[Interval]:
    """BCa interval of the mean of each row.

    The percentile interval of the same resamples where BCa is not defined, and of differences of 0 and 1: its bias
    correction expects many values, and would tell 3 wins among 61 ties from chance.
    """
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (data,),
            np.mean,
            axis=1,
            n_resamples=RESAMPLES,
            batch=max(1, AT_ONCE // data.size),
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    means = data.mean(1)
    plain = np.percentile(found.bootstrap_distribution, (2.5, 97.5), axis=1)
    few = np.isin(data, (-1.0, 0.0, 1.0)).all(1)
    ends = np.where(few | np.isnan(found.confidence_interval), plain, found.confidence_interval)
    constant = np.ptp(data, axis=1) == 0  # whose resamples differ from the mean in the last bit
    low, high = np.where(constant, means, ends)
    return [Interval(*map(float, one)) for one in zip(means, low, high, strict=True)]


def p_values(differences: Float[np.ndarray, "k n"], resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """For each row, how likely a mean this far from 0 is if each difference may as well have the other sign.

    Fisher's exact test where there are no more than `resamples` ways to set the signs, else a sample of them; Student's
    t where there are MANY pairs.
    """
    k, n = differences.shape
    if n >= MANY:
        found = students(differences).pvalue
        return np.where(np.isnan(found), differences.mean(1) == 0, found).tolist()
    exact = 2**n <= resamples
    ways = 2**n if exact else resamples
    sums = differences.sum(1)
    # Equal sums may differ in their last bits, for they are added up in another order.
    far = np.abs(sums) - 1e-9 * np.abs(differences).sum(1)
    rng, count, step = np.random.default_rng(seed), np.zeros(k, dtype=np.int64), max(1, AT_ONCE // (n + k))
    for first in range(0, ways, step):
        rows = min(step, ways - first)
        bits = (np.arange(first, first + rows)[:, None] >> np.arange(n)) & 1 if exact else rng.integers(0, 2, (rows, n))
        count += (np.abs((1.0 - 2.0 * bits) @ differences.T) >= far).sum(0)
    return (count / ways if exact else (1 + count) / (1 + ways)).tolist()


def holm(p: Sequence[float]) -> list[float]:
    """P-values that may be held against one level however many there are (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()
