"""What is kept of calibration calls, against scipy and torch on all of them at once."""

import pytest
import torch
from hypothesis import given as tried
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.stats import norm
from torch import Tensor

from fp4dit.formats import integer
from fp4dit.observers import ChannelRange, MovingRange, Observer, Sample, spread
from fp4dit.scales import AbsMax, Percentile


def calls(count: int = 7) -> list[Tensor]:
    return list(torch.randn(count, 2, 5, 12, generator=torch.Generator().manual_seed(0)))


def observed(observer: Observer, given: list[Tensor]) -> Tensor:
    return observer.gather([observer.note(x) for x in given])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_a_moving_range_is_a_first_order_filter_that_starts_at_the_first_call(momentum: float):
    given = calls()
    for found, ends in zip(observed(MovingRange(momentum), given), ("min", "max"), strict=True):
        series = [getattr(x, ends)().item() for x in given]
        filtered, _ = lfilter([1 - momentum], [1, -momentum], series, zi=[momentum * series[0]])
        assert found.item() == pytest.approx(filtered[-1], rel=1e-5)


def test_channel_ranges_are_those_of_all_tokens_together():
    given = calls()
    tokens = torch.stack(given).view(-1, 12)
    assert torch.equal(observed(ChannelRange(), given), torch.stack([tokens.amin(0), tokens.amax(0)]))


def test_channel_ranges_may_come_with_tokens_of_every_call():
    given = calls()
    found = observed(ChannelRange(3), given)
    assert torch.equal(found[:2], observed(ChannelRange(), given))
    assert len(found) == 2 + 3 * len(given)
    for x, some in zip(given, found[2:].split(3), strict=True):
        assert (some[:, None] == x.view(-1, 12)).all(2).any(1).all()


@tried(st.integers(1, 10**6), st.integers(1, 2000))
def test_places_are_spread_evenly(n: int, count: int):
    places = spread(n, count)
    assert 0.7 * min(n, count) <= len(places) <= min(n, count)
    assert (places.diff() > 0).all()
    ends = torch.cat([torch.tensor([-1]), places, torch.tensor([n])])
    assert ends.diff().max() <= 2 + 2.7 * n / count


@pytest.mark.parametrize("period", [2, 3, 7, 16, 64, 256])
@pytest.mark.parametrize("periods", [16, 60, 1000, 1024])
def test_places_are_in_step_with_no_period(period: int, periods: int):
    """Every kth place of rows of 256 channels might be channel 0 of each."""
    count = 16 * period
    seen = (spread(period * periods, count) % period).bincount(minlength=period)
    assert seen.min() >= min(periods, 16) / 4


@pytest.mark.parametrize("count", [1, 16, 1000])
def test_a_sample_holds_values_of_every_call_and_all_extremes(count: int):
    given = calls()
    found = observed(Sample(count), given)
    together = torch.stack(given)
    assert torch.isin(found, together).all()
    for x in given:
        of_this = torch.isin(x, found)
        assert of_this[x == x.max()].all()
        assert of_this[x == x.min()].all()
        assert of_this.sum() >= min(0.9 * count, x.numel())
    assert (found.min(), found.max()) == (together.min(), together.max())
    assert len(found) <= len(given) * (2 * count + 2)


@pytest.mark.parametrize("extremes", [False, True])
def test_percentiles_of_a_sample_without_extremes_are_those_of_all_values(extremes: bool):
    """Of the normal distribution's 0.01 % that lie farthest out; extremes of large calls push them apart."""
    given = torch.randn(20, 1_000_000, generator=torch.Generator().manual_seed(0))
    found = observed(Sample(2048, extremes=extremes), list(given))
    end = Percentile(AbsMax(), keep=0.9999)(found[None], integer(8)).scale.item() * 127
    assert (abs(end / norm.isf(5e-5) - 1) < 0.1) == (not extremes)


def test_notes_are_kept_in_full_precision_off_the_model():
    for observer in (Sample(4), MovingRange(), ChannelRange()):
        note = observer.note(calls()[0].bfloat16())
        assert (note.dtype, note.device.type) == (torch.float32, "cpu")
