"""Confidence intervals of means, tests of paired differences, and a correction for many tests.

SciPy is imported where it is used, because its import is slow and the core works without it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 9_999

MIN_VALUES_FOR_T = 1_000  # from this number on, Student's t agrees with resampling

MAX_NUMBERS_IN_MEMORY = 2**22  # numbers of resamples that are held at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: The mean.
        low: The lower end of the interval.
        high: The upper end of the interval.
    """

    mean: float
    low: float
    high: float


def compute_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the interval of a mean: BCa bootstrap (Efron 1987), or Wilson's if all are 0 or 1.

    Values that are all equal, as a single one is, show no spread: their interval has no width.

    Example:
        >>> compute_interval([0, 1, 1, 1])
        Interval(mean=0.75, low=0.3006..., high=0.9544...)
    """
    from scipy.stats import binomtest

    data = np.asarray(values, dtype=np.float64)
    if set(data) <= {0.0, 1.0}:
        wilson = binomtest(int(data.sum()), len(data)).proportion_ci(method="wilson")
        return Interval(float(data.mean()), float(wilson.low), float(wilson.high))
    if np.ptp(data) == 0:
        return Interval(float(data[0]), float(data[0]), float(data[0]))
    return bootstrap_intervals(data[None], seed)[0]


def compute_intervals(data: Float[np.ndarray, "k n"], seed: int = 0) -> list[Interval]:
    """Return the interval of the mean of each row.

    It is a BCa bootstrap, or Student's interval from `MIN_VALUES_FOR_T` values on. The interval of
    a single value has infinite ends.
    """
    means, n = data.mean(1), data.shape[1]
    if n == 1:
        return [Interval(float(mean), -inf, inf) for mean in means]
    if n < MIN_VALUES_FOR_T:
        return bootstrap_intervals(data, seed)
    ends = run_t_tests(data).confidence_interval()
    constant = np.ptp(data, axis=1) == 0
    return _make_intervals(
        means, np.where(constant, means, ends.low), np.where(constant, means, ends.high)
    )


def run_t_tests(data: Float[np.ndarray, "k n"]) -> Any:
    """Return scipy's t test of each row against a mean of 0. It is nan for a constant row."""
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # raised for nearly constant rows
        return ttest_1samp(data, 0.0, axis=1)


def bootstrap_intervals(data: Float[np.ndarray, "k n"], seed: int) -> list[Interval]:
    """Return the BCa interval of the mean of each row.

    It is the percentile interval of the same resamples where BCa is not defined, and for
    differences of 0 and 1: the bias correction of BCa expects many different values, and would
    declare 3 wins among 61 ties significant.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            (data,),
            np.mean,
            axis=1,
            n_resamples=RESAMPLES,
            batch=max(1, MAX_NUMBERS_IN_MEMORY // data.size),
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    means = data.mean(1)
    percentiles = np.percentile(result.bootstrap_distribution, (2.5, 97.5), axis=1)
    binary = np.isin(data, (-1.0, 0.0, 1.0)).all(1)
    bca = result.confidence_interval
    ends = np.where(binary | np.isnan(bca), percentiles, bca)
    # The resamples of a constant row can differ from its mean in the last bit.
    constant = np.ptp(data, axis=1) == 0
    low, high = np.where(constant, means, ends)
    return _make_intervals(means, low, high)


def _make_intervals(means: Any, low: Any, high: Any) -> list[Interval]:
    rows = zip(means, low, high, strict=True)
    return [Interval(float(mean), float(start), float(end)) for mean, start, end in rows]


def compute_p_values(
    differences: Float[np.ndarray, "k n"], resamples: int = RESAMPLES, seed: int = 0
) -> list[float]:
    """Return the two-sided p-value of each row of differences, by a sign-flip permutation test.

    The hypothesis is that each difference is as likely to have the other sign. The test is exact
    (Fisher) if there are no more than `resamples` ways to set the signs, and else uses a sample of
    them. From `MIN_VALUES_FOR_T` pairs on it is Student's t test.
    """
    k, n = differences.shape
    if n >= MIN_VALUES_FOR_T:
        p_values = run_t_tests(differences).pvalue
        return np.where(np.isnan(p_values), differences.mean(1) == 0, p_values).tolist()
    exact = 2**n <= resamples
    num_flips = 2**n if exact else resamples
    sums = differences.sum(1)
    # Equal sums can differ in their last bits, because they are added up in another order.
    threshold = np.abs(sums) - 1e-9 * np.abs(differences).sum(1)
    rng, count = np.random.default_rng(seed), np.zeros(k, dtype=np.int64)
    step = max(1, MAX_NUMBERS_IN_MEMORY // (n + k))
    for first in range(0, num_flips, step):
        rows = min(step, num_flips - first)
        if exact:
            flips = (np.arange(first, first + rows)[:, None] >> np.arange(n)) & 1
        else:
            flips = rng.integers(0, 2, (rows, n))
        count += (np.abs((1.0 - 2.0 * flips) @ differences.T) >= threshold).sum(0)
    return (count / num_flips if exact else (1 + count) / (1 + num_flips)).tolist()


def apply_holm_correction(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down procedure (Holm 1979).

    The adjusted values can be compared with one level, such as 0.05, however many there are.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, np.float64)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()
