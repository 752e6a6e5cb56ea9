"""Observers against scipy and torch on all calls at once."""

import pytest
import torch
from hypothesis import given as tried
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.stats import norm
from torch import Tensor

from fp4dit.numerics.formats import integer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.numerics.scale_search import Percentile
from fp4dit.quantization.observers import (
    MovingAverageMinMaxObserver,
    MovingAveragePartsObserver,
    Observer,
    PerChannelMinMaxObserver,
    SampleObserver,
    spread_indices,
)


def make_calls(count: int = 7) -> list[Tensor]:
    return list(torch.randn(count, 2, 5, 12, generator=torch.Generator().manual_seed(0)))


def observe_calls(observer: Observer, activations: list[Tensor]) -> Tensor:
    return observer.merge([observer.summarize(x) for x in activations])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_moving_average_min_max_is_a_first_order_filter(momentum: float):
    activations = make_calls()
    for observed, ends in zip(
        observe_calls(MovingAverageMinMaxObserver(momentum), activations),
        ("min", "max"),
        strict=True,
    ):
        series = [getattr(x, ends)().item() for x in activations]
        filtered, _ = lfilter([1 - momentum], [1, -momentum], series, zi=[momentum * series[0]])
        assert observed.item() == pytest.approx(filtered[-1], rel=1e-5)


def test_channel_ranges_are_those_of_all_tokens_together():
    activations = make_calls()
    tokens = torch.stack(activations).view(-1, 12)
    assert torch.equal(
        observe_calls(PerChannelMinMaxObserver(), activations),
        torch.stack([tokens.amin(0), tokens.amax(0)]),
    )


def test_channel_ranges_may_come_with_tokens_of_every_call():
    activations = make_calls()
    merged = observe_calls(PerChannelMinMaxObserver(3), activations)
    assert torch.equal(merged[:2], observe_calls(PerChannelMinMaxObserver(), activations))
    assert len(merged) == 2 + 3 * len(activations)
    for x, some in zip(activations, merged[2:].split(3), strict=True):
        assert (some[:, None] == x.view(-1, 12)).all(2).any(1).all()


@tried(st.integers(1, 10**6), st.integers(1, 2000))
def test_places_are_spread_evenly(n: int, count: int):
    places = spread_indices(n, count)
    assert 0.7 * min(n, count) <= len(places) <= min(n, count)
    assert (places.diff() > 0).all()
    ends = torch.cat([torch.tensor([-1]), places, torch.tensor([n])])
    assert ends.diff().max() <= 2 + 2.7 * n / count


@pytest.mark.parametrize("period", [2, 3, 7, 16, 64, 256])
@pytest.mark.parametrize("periods", [16, 60, 1000, 1024])
def test_places_are_in_step_with_no_period(period: int, periods: int):
    """Every kth place of rows of 256 channels might be channel 0 of each."""
    count = 16 * period
    seen = (spread_indices(period * periods, count) % period).bincount(minlength=period)
    assert seen.min() >= min(periods, 16) / 4


@pytest.mark.parametrize("count", [1, 16, 1000])
def test_a_sample_holds_values_of_every_call_and_all_extremes(count: int):
    activations = make_calls()
    merged = observe_calls(SampleObserver(count), activations)
    together = torch.stack(activations)
    assert torch.isin(merged, together).all()
    for x in activations:
        of_this = torch.isin(x, merged)
        assert of_this[x == x.max()].all()
        assert of_this[x == x.min()].all()
        assert of_this.sum() >= min(0.9 * count, x.numel())
    assert (merged.min(), merged.max()) == (together.min(), together.max())
    assert len(merged) <= len(activations) * (2 * count + 2)


@pytest.mark.parametrize("extremes", [False, True])
def test_percentiles_of_a_sample_are_those_of_all_values(extremes: bool):
    """Percentiles of 0.01 % of a normal distribution; the extremes of large calls move them."""
    activations = torch.randn(20, 1_000_000, generator=torch.Generator().manual_seed(0))
    merged = observe_calls(SampleObserver(2048, extremes=extremes), list(activations))
    end = Percentile(AbsMax(), keep=0.9999)(merged[None], integer(8)).scale.item() * 127
    assert (abs(end / norm.isf(5e-5) - 1) < 0.1) == (not extremes)


def test_notes_are_kept_in_full_precision_off_the_model():
    for observer in (SampleObserver(4), MovingAverageMinMaxObserver(), PerChannelMinMaxObserver()):
        note = observer.summarize(make_calls()[0].bfloat16())
        assert (note.dtype, note.device.type) == (torch.float32, "cpu")


def test_ranges_of_parts_are_those_of_the_parts():
    calls = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    both, single = MovingAveragePartsObserver(0.8, parts=2), MovingAverageMinMaxObserver(0.8)
    merged = both.merge([both.summarize(x) for x in calls])
    for part, columns in zip((0, 1), (slice(0, 4), slice(4, 8)), strict=True):
        expected = single.merge([single.summarize(x.chunk(2, -1)[part]) for x in calls])
        assert torch.equal(merged[:, columns], expected[:, None].expand(-1, 4))
