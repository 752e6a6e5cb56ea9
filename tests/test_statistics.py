import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, ttest_rel

from fp4dit.statistics import difference, interval

RNG = np.random.default_rng(0)
HARD = RNG.normal(30, 5, 200)  # what is common to a pair: how hard a prompt is
A, B = HARD + RNG.normal(0.5, 1, 200), HARD + RNG.normal(0, 1, 200)
VALUE = st.integers(-100, 100).map(float)


def test_the_interval_of_a_difference_is_that_of_the_paired_t_test():
    found, t = difference(A.tolist(), B.tolist()), ttest_rel(A, B).confidence_interval()
    assert found.mean == pytest.approx(A.mean() - B.mean())
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.1 * (t.high - t.low))


def test_the_interval_of_a_difference_is_scipys_paired_bootstrap_up_to_its_seed():
    mean = lambda a, b, axis: a.mean(axis) - b.mean(axis)
    theirs = bootstrap((A, B), mean, paired=True, vectorized=True, method="percentile", rng=np.random.default_rng(9))
    low, high = theirs.confidence_interval
    found = difference(A.tolist(), B.tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_what_both_have_in_common_does_not_widen_it():
    """The same means, whose own intervals overlap, are told apart when they are paired."""
    assert interval(A.tolist()).low < interval(B.tolist()).high
    assert difference(A.tolist(), B.tolist()).low > 0


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (3, 0), (3, 3), (8, 7), (9, 0), (20, 4), (30, 12)])
def test_of_zeros_and_ones_it_agrees_with_mcnemars_exact_test_where_that_is_clear(gained: int, lost: int):
    """Of 64 images, some are right only here, some only there. Between p = 0.02 and 0.2 the two may differ."""
    p = binomtest(gained, gained + lost).pvalue
    assert not 0.02 < p < 0.2
    rest = 64 - gained - lost
    found = difference([1.0] * gained + [0.0] * lost + [1.0] * rest, [0.0] * gained + [1.0] * lost + [1.0] * rest)
    assert (found.low > 0) == (p < 0.05)
    assert found.mean == (gained - lost) / 64


@settings(max_examples=25)  # each costs two bootstraps
@given(st.lists(st.tuples(VALUE, VALUE), min_size=2, max_size=20))
def test_swapping_the_two_turns_the_interval_round(pairs: list[tuple[float, float]]):
    a, b = zip(*pairs, strict=True)
    there, back = difference(a, b), difference(b, a)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert there.low <= there.mean <= there.high


def test_equal_rows_do_not_differ_and_a_single_pair_says_nothing():
    same = difference([1.0, 2.0], [1.0, 2.0])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    one = difference([3.0], [1.0])
    assert (one.mean, one.low, one.high) == (2, -np.inf, np.inf)


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        difference([1.0, 2.0], [1.0])
