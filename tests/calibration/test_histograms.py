"""Test histograms in units of the grid against those of NumPy and against counts."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fp4dit.calibration.histograms import (
    BINS,
    Histogram,
    HistogramTask,
    compute_weight_histogram,
    copy_weights,
    create_histogram,
)
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import MinMax
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.transforms.hadamard import Hadamard
from tests.calibration.test_activations import DYNAMIC, make_states, quantize_pipeline
from tests.helpers import tiny

E2M1 = floating(2, 1)


def test_counts_are_those_of_numpy_on_clipped_values():
    histogram, x = Histogram(E2M1.values()), 4 * torch.randn(10_000, dtype=torch.float64)
    histogram.add(x, E2M1.nearest(x))
    edges = np.linspace(-7.5, 7.5, BINS + 1)  # with an eighth of the grid's length at each end
    expected, _ = np.histogram(np.clip(x.numpy(), -7.5, 7.5), edges)
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    clipped_share = histogram.to_dict()["clipped_share"]
    assert clipped_share == pytest.approx(np.mean(np.abs(x.numpy()) > 7))  # 6 and half a step
    assert clipped_share == pytest.approx(math.erfc(7 / 4 / math.sqrt(2)), rel=0.2)


def test_every_level_is_counted_once():
    histogram, values = Histogram(E2M1.values()), E2M1.values()
    histogram.add(values, values)
    fields = histogram.to_dict()
    assert fields["level_counts"] == [1] * 15
    assert fields["levels"] == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_the_levels_of_a_large_format_are_not_counted():
    e4m3 = floating(4, 3, reserved=1)
    assert "level_counts" not in Histogram(e4m3.values()).to_dict()


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(E2M1, PerGroup(16)),
        Quantizer(integer(4, signed=False), PerChannel(), MinMax()),
    ],
)
@pytest.mark.parametrize("transforms", [(), (Hadamard(),)])
def test_the_counts_of_a_weight_are_those_of_its_codes(quantizer: Quantizer, transforms):
    torch.manual_seed(0)
    source = nn.Linear(64, 8)
    before = copy_weights({"layer": source})["layer"]
    layer = make_quant_layer(source, quantizer, transforms)
    layer.prepare(torch.randn(1, 4, 64))
    layer.commit_weight()
    fields = compute_weight_histogram(layer, before).to_dict()
    assert sum(fields["counts"]) == sum(fields["level_counts"]) == before.numel()
    blocks = quantizer.granularity.split(layer.weight_matrix)
    codes = layer.weight_fake_quant.qparams.to_grid(blocks).round(decimals=3).flatten()
    actual = {}
    for level, count in zip(fields["levels"], fields["level_counts"], strict=True):
        if count:
            actual[level] = count
    expected = {}
    for level, count in zip(*codes.unique(return_counts=True), strict=True):
        expected[round(level.item(), 3) + 0.0] = count.item()
    assert actual == expected
    assert fields["clipped_share"] == 0


def test_activations_are_counted_in_units_of_their_scales(pipeline):
    activations, _ = quantize_pipeline(pipeline, DYNAMIC)
    task, states = HistogramTask(pipeline, activations), make_states(pipeline)
    tiny.trainer()().test(task, tiny.load_one_by_one(states), verbose=False)
    for name, histogram in task.histograms.items():
        counts = histogram.counts.tolist()
        assert sum(counts) > 0, name
        # The largest value of each token lies on an end of the grid.
        assert histogram.num_clipped == 0
        low_end, high_end = BINS // 9, -BINS // 9
        ends = counts[low_end - 2 : low_end + 2] + counts[high_end - 2 : high_end + 2]
        assert sum(ends) > 0, name


def test_a_selection_of_formats_has_the_levels_of_all():
    selection = FormatSelection([E2M1, floating(3, 0)], LeastError())
    levels = create_histogram(FakeQuantize(Quantizer(selection, PerChannel()))).levels
    expected = torch.cat([E2M1.values(), floating(3, 0).values()]).unique()
    assert torch.equal(levels, expected)
