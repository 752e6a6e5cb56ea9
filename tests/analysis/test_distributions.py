"""Distributions against SciPy's, which are not ours."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from fp4dit.analysis import Distribution, GeneralizedNormal, StudentT, Uniform


def unit_variance(frozen):
    """Return a distribution of SciPy, scaled to unit variance."""
    return frozen.dist(*frozen.args, scale=1 / frozen.std(), **frozen.kwds)


PEERS = [
    (GeneralizedNormal(2.0), stats.norm()),
    (GeneralizedNormal(1.0), stats.laplace(scale=1 / math.sqrt(2))),
    (GeneralizedNormal(0.7), unit_variance(stats.gennorm(0.7))),
    (GeneralizedNormal(4.0), unit_variance(stats.gennorm(4.0))),
    (StudentT(2.5), unit_variance(stats.t(2.5))),
    (StudentT(6.0), unit_variance(stats.t(6.0))),
    (Uniform(), stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))),
]
IDS = [str(ours) for ours, _ in PEERS]


@pytest.mark.parametrize(("ours", "peer"), PEERS, ids=IDS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_partial_moments_are_integrals_of_scipys_density(ours: Distribution, peer, order: int):
    for end in (0.01, 0.7, 1.5, 5.0):
        inside = min(end, float(peer.support()[1]))
        expected, _ = quad(lambda t: t**order * peer.pdf(t), 0, inside, epsabs=1e-12)
        x = np.array([end, -end])
        assert ours.half_moment(order, np.abs(x))[0] == pytest.approx(expected, rel=1e-8)
        signs = np.array([1, (-1) ** (order + 1)])
        assert ours.moment(order, x) == pytest.approx(expected * signs, rel=1e-8)


@pytest.mark.parametrize(("ours", "peer"), PEERS, ids=IDS)
def test_quantiles_are_scipys_into_the_tail(ours: Distribution, peer):
    above = np.array([0.999, 0.5, 1e-3, 1e-12])
    assert ours.magnitude_quantile(above) == pytest.approx(peer.isf(above / 2), rel=1e-7)
    below = np.array([1e-12, 0.3, 0.5, 0.8])
    assert ours.quantile(below, 1 - below) == pytest.approx(peer.ppf(below), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("ours", "peer"), PEERS, ids=IDS)
def test_the_variance_is_one_and_the_kurtosis_is_scipys(ours: Distribution, peer):
    whole = 2 * ours.half_moment(2, np.array([1e30]))[0]
    assert whole == pytest.approx(1, rel=1e-5)
    kurtosis = peer.stats(moments="k")
    if np.isfinite(kurtosis):
        assert ours.kurtosis == pytest.approx(float(kurtosis), abs=1e-9)
    else:
        assert ours.kurtosis == math.inf


@pytest.mark.parametrize(("ours", "peer"), PEERS, ids=IDS)
def test_samples_are_of_scipys_distribution(ours: Distribution, peer):
    sample = ours.sample((100, 50), np.random.default_rng(0))
    assert sample.shape == (100, 50)
    assert stats.kstest(sample.ravel(), peer.cdf).pvalue > 0.01


def test_a_distribution_without_variance_is_refused():
    with pytest.raises(ValueError, match="give more than 2 degrees"):
        StudentT(2.0)
