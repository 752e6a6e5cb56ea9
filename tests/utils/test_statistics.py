"""Intervals and tests, compared with scipy, closed forms and simulation."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, permutation_test, t, ttest_rel

from fp4dit.utils.statistics import (
    MIN_VALUES_FOR_T,
    RESAMPLES,
    Interval,
    apply_holm_correction,
    compute_interval,
    compute_intervals,
    compute_p_values,
)

RNG = np.random.default_rng(0)
HARD = RNG.normal(30, 5, 200)  # what is common to a pair: how hard a prompt is
A, B = HARD + RNG.normal(0.5, 1, 200), HARD + RNG.normal(0, 1, 200)
VALUE = st.integers(-100, 100).map(float)


def estimate_difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the interval of the mean difference of pairs."""
    return compute_intervals((np.array(values) - np.array(others))[None])[0]


def test_interval_of_a_difference_matches_paired_t():
    """The interval of a difference is that of the paired t test."""
    found, students = (
        estimate_difference(A.tolist(), B.tolist()),
        ttest_rel(A, B).confidence_interval(),
    )
    assert found.mean == pytest.approx(A.mean() - B.mean())
    assert (found.low, found.high) == pytest.approx(
        students, abs=0.1 * (students.high - students.low)
    )


def test_interval_of_a_difference_matches_scipy():
    """The interval of a difference is scipys paired bootstrap up to its seed."""
    mean = lambda a, b, axis: a.mean(axis) - b.mean(axis)
    theirs = bootstrap(
        (A, B), mean, paired=True, vectorized=True, method="BCa", rng=np.random.default_rng(9)
    )
    low, high = theirs.confidence_interval
    found = estimate_difference(A.tolist(), B.tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_what_both_have_in_common_does_not_widen_it():
    """The same means, whose own intervals overlap, are told apart when they are paired."""
    assert compute_interval(A.tolist()).low < compute_interval(B.tolist()).high
    assert estimate_difference(A.tolist(), B.tolist()).low > 0


@pytest.mark.parametrize(
    ("gained", "lost"), [(1, 0), (3, 0), (3, 3), (8, 7), (9, 0), (20, 4), (30, 12)]
)
def test_interval_of_zeros_and_ones_agrees_with_mcnemar(gained: int, lost: int):
    """Some of 64 images are right only here, some only there.

    Between p = 0.02 and 0.2 the two may differ.
    """
    p = binomtest(gained, gained + lost).pvalue
    assert not 0.02 < p < 0.2
    rest = 64 - gained - lost
    found = estimate_difference(
        [1.0] * gained + [0.0] * lost + [1.0] * rest, [0.0] * gained + [1.0] * lost + [1.0] * rest
    )
    assert (found.low > 0) == (p < 0.05)
    assert found.mean == (gained - lost) / 64


@settings(max_examples=25)  # each costs two bootstraps
@given(st.lists(st.tuples(VALUE, VALUE), min_size=2, max_size=20))
def test_swapping_the_two_turns_the_interval_round(pairs: list[tuple[float, float]]):
    a, b = zip(*pairs, strict=True)
    there, back = estimate_difference(a, b), estimate_difference(b, a)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert there.low <= there.mean <= there.high


@pytest.mark.parametrize("n", [64, 500])
def test_the_interval_of_a_mean_of_normal_values_is_students(n: int):
    data = np.random.default_rng(1).normal(5, 2, n)
    half = t.ppf(0.975, n - 1) * data.std(ddof=1) / np.sqrt(n)
    found = compute_interval(data.tolist())
    assert (found.low, found.high) == pytest.approx(
        (data.mean() - half, data.mean() + half), abs=0.15 * half
    )


def test_interval_of_skewed_values_leans_to_the_tail():
    """It leans by 1/6 of the mean's skewness times z^2 - 1 standard errors on either side.

    See Efron 1987, eq. 4.4.
    """
    data = np.random.default_rng(2).exponential(1, 200)
    error, skew = (
        data.std() / np.sqrt(200),
        ((data - data.mean()) ** 3).mean() / data.std() ** 3 / np.sqrt(200),
    )
    shift = (2 * 1.96**2 + 1) * skew / 6 * error
    found = compute_interval(data.tolist())
    assert (found.low + found.high) / 2 - data.mean() == pytest.approx(shift, rel=0.3)


def test_the_interval_holds_the_mean_in_95_of_100_draws():
    rng = np.random.default_rng(3)
    found = [compute_interval(rng.normal(1, 1, 40).tolist(), seed=i) for i in range(100)]
    missed = sum(not one.low <= 1 <= one.high for one in found)
    assert (
        binomtest(missed, 100, 0.06).pvalue > 0.01
    )  # of 40 images the bootstrap's is a little too short


@pytest.mark.parametrize("data", [[2.0, 2.0, 2.0], [2.0, 2.0, 3.0], [0.1] * 7, [5.0], [1.5, 2.5]])
def test_of_values_that_allow_no_bca_there_is_an_interval_still(data: list[float]):
    found = compute_interval(data)
    assert min(data) <= found.low <= found.mean <= found.high <= max(data)
    assert (found.low == found.high) == (len(set(data)) == 1)


def test_rows_side_by_side_get_what_each_gets_alone():
    data = RNG.normal(0.3, 1, (3, 40))
    assert [vars(one) for one in compute_intervals(data)] == [
        pytest.approx(vars(estimate_difference(row.tolist(), [0.0] * 40))) for row in data
    ]


def test_student_agrees_with_resampling_for_many_pairs():
    """Of many pairs students interval and p are those of resampling."""
    skewed = np.random.default_rng(4).exponential(1, MIN_VALUES_FOR_T) - 0.92
    students, resampled = compute_intervals(skewed[None])[0], compute_interval(skewed.tolist())
    assert vars(students) == pytest.approx(
        vars(resampled), abs=0.05 * (resampled.high - resampled.low)
    )
    assert compute_p_values(skewed[None])[0] == pytest.approx(
        compute_p_values(skewed[None, : MIN_VALUES_FOR_T - 1])[0], abs=0.01
    )
    constant = np.array([[0.5] * MIN_VALUES_FOR_T, [0.0] * MIN_VALUES_FOR_T])
    assert [vars(one) for one in compute_intervals(constant)] == [
        {"mean": v, "low": v, "high": v} for v in (0.5, 0)
    ]
    assert compute_p_values(constant) == [0, 1]


@pytest.mark.parametrize("n", [2, 7, 14])
def test_the_test_of_few_pairs_is_scipys_exact_one(n: int):
    data = np.random.default_rng(n).normal(0.5, 1, (3, n))
    theirs = [permutation_test((row,), np.mean, permutation_type="samples").pvalue for row in data]
    assert compute_p_values(data) == pytest.approx(theirs, abs=0.02 if 2**n > RESAMPLES else 1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (6, 0), (8, 2), (30, 12)])
def test_the_test_of_zeros_and_ones_is_mcnemars(gained: int, lost: int):
    data = np.array([[1.0] * gained + [-1.0] * lost + [0.0] * (64 - gained - lost)])
    assert compute_p_values(data)[0] == pytest.approx(
        binomtest(gained, gained + lost).pvalue, abs=0.015
    )


def test_false_positive_rate_and_power():
    """The test errs as often as it says and finds what is there."""
    rng = np.random.default_rng(5)
    assert (
        binomtest(
            int((np.array(compute_p_values(rng.normal(0, 1, (1000, 30)))) < 0.05).sum()), 1000, 0.05
        ).pvalue
        > 0.01
    )
    assert compute_p_values(rng.normal(2, 1, (1, 30)))[0] == 1 / (1 + RESAMPLES)
    assert compute_p_values(np.zeros((1, 30))) == [1]


def test_holm_matches_the_step_down_procedure():
    """Test four hypotheses at 0.05.

    0.005 < 0.05/4 and 0.01 < 0.05/3 are rejected; 0.03 > 0.05/2 ends the procedure before 0.04.
    """
    assert apply_holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert apply_holm_correction([0.6, 0.7]) == [1, 1]
    assert apply_holm_correction([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_stepping_down_rejects(p: list[float], level: float):
    rejected = 0
    for value in sorted(p):
        if value * (len(p) - rejected) >= level:
            break
        rejected += 1
    assert sum(value < level for value in apply_holm_correction(p)) == rejected


def test_equal_rows_do_not_differ_and_a_single_pair_says_nothing():
    same = estimate_difference([1.0, 2.0], [1.0, 2.0])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    one = estimate_difference([3.0], [1.0])
    assert (one.mean, one.low, one.high) == (2, -np.inf, np.inf)
