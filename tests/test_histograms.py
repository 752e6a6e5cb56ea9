"""Histograms on a grid, beside numpy's and beside counting."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fp4dit.formats import floating, integer
from fp4dit.grid import Grid
from fp4dit.hadamard import Hadamard
from fp4dit.histograms import BINS, Histogram, of_grid, of_weight, originals
from fp4dit.layer import wrap
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import MinMax
from fp4dit.tasks.histograms import Watch
from tests import tiny
from tests.test_activate import ONLINE, quantized, states

E2M1 = floating(2, 1)


def test_counts_are_numpys_and_what_is_outside_falls_into_the_outermost_bins():
    found, x = Histogram(E2M1.values()), 4 * torch.randn(10_000, dtype=torch.float64)
    found.add(x, E2M1.nearest(x))
    edges = np.linspace(-7.5, 7.5, BINS + 1)  # an eighth of the grid's length beyond either end
    expected, _ = np.histogram(np.clip(x.numpy(), -7.5, 7.5), edges)
    np.testing.assert_array_equal(found.counts.numpy(), expected)
    assert found.told()["beyond"] == pytest.approx(np.mean(np.abs(x.numpy()) > 7))  # 6 and half of the last step
    assert found.told()["beyond"] == pytest.approx(math.erfc(7 / 4 / math.sqrt(2)), rel=0.2)


def test_every_level_is_counted_once():
    found, values = Histogram(E2M1.values()), E2M1.values()
    found.add(values, values)
    assert found.told()["taken"] == [1] * 15
    assert found.told()["levels"] == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert "taken" not in Histogram(floating(4, 3, reserved=1).values()).told()  # of many levels it would say little


@pytest.mark.parametrize(
    "quantizer",
    [Quantizer(E2M1, Granularity("group", 16)), Quantizer(integer(4, signed=False), Granularity("row"), MinMax())],
)
@pytest.mark.parametrize("transforms", [(), (Hadamard(),)])
def test_a_weight_lies_where_its_scales_put_it(quantizer: Quantizer, transforms):
    torch.manual_seed(0)
    source = nn.Linear(64, 8)
    before = originals({"layer": source})["layer"]
    layer = wrap(source, quantizer, transforms)
    layer.prepare(torch.randn(1, 4, 64))
    layer.freeze()
    told = of_weight(layer, before).told()
    assert sum(told["counts"]) == sum(told["taken"]) == before.numel()
    codes = layer.grid.scaling.to_grid(quantizer.granularity.split(layer.rows)).round(decimals=3).flatten()
    found = {level: count for level, count in zip(told["levels"], told["taken"], strict=True) if count}
    levels, counts = codes.unique(return_counts=True)
    assert found == {round(k, 3) + 0.0: n for k, n in zip(levels.tolist(), counts.tolist(), strict=True)}
    assert told["beyond"] == 0


def test_activations_are_watched_in_units_of_their_own_scales(pipeline):
    activations, _ = quantized(pipeline, ONLINE)
    watch, calls = Watch(pipeline, activations), states(pipeline)
    tiny.trainer()().test(watch, tiny.one_by_one(calls), verbose=False)
    for name, found in watch.found.items():
        told = found.told()
        assert sum(told["counts"]) > 0, name
        assert told["beyond"] == 0  # a scale of each token's largest value
        ends = told["counts"][BINS // 9 - 2 : BINS // 9 + 2] + told["counts"][-BINS // 9 - 2 : -BINS // 9 + 2]
        assert sum(ends) > 0, name  # which lies on the end of the grid


def test_a_format_that_is_to_be_chosen_has_the_levels_of_all():
    from fp4dit.choice import Choice, LeastError

    choice = Choice([E2M1, floating(3, 0)], LeastError())
    levels = of_grid(Grid(Quantizer(choice, Granularity("row")))).levels
    assert set(levels.tolist()) == set(E2M1.values().tolist()) | set(floating(3, 0).values().tolist())
