"""Histograms of weights and activations in units of the grid of their format."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calibration.activations import ReplayTask
from fp4dit.models.base import Pipeline
from fp4dit.quantization.fake_quant import FakeQuantize, candidate_formats
from fp4dit.quantization.layers import QuantLayer

BINS = 96

# The width of the bins beyond each end of the grid, as a share of the length of the grid.
MARGIN = 1 / 8

# Histograms of formats with more levels do not report how many values were rounded to each level.
MAX_COUNTED_LEVELS = 64


class Histogram:
    """Histogram of values in units of the grid, in `BINS` equal bins.

    The bins reach a little beyond both ends of the grid. Values further out are counted in the
    outermost bins.

    Args:
        levels: The values of the format, in order.

    Example:
        >>> histogram = Histogram(fmt.values())
        >>> histogram.add(x, fmt.nearest(x))
        >>> histogram.to_dict()["clipped_share"]
        0.002
    """

    def __init__(self, levels: Float[Tensor, "v"]) -> None:
        self.levels = levels.cpu()
        first, second, *_, before, last = self.levels.tolist()
        # Values up to half a step beyond an end do not count as clipped, because rounding changes
        # them no more than other values.
        self.ends = first - (second - first) / 2, last + (last - before) / 2
        margin = MARGIN * (last - first)
        self.low, self.high = first - margin, last + margin
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.level_counts = torch.zeros(len(levels), dtype=torch.int64)
        self.num_clipped = 0

    def add(self, x: Float[Tensor, "..."], rounded: Float[Tensor, "..."]) -> None:
        """Count values, and the levels that they were rounded to, both in units of the grid."""
        bins = ((x - self.low) * (BINS / (self.high - self.low))).long().clamp_(0, BINS - 1)
        self.counts += bins.flatten().bincount(minlength=BINS).cpu()
        self.num_clipped += int(((x < self.ends[0]) | (x > self.ends[1])).sum())
        middle = (self.levels[1:] + self.levels[:-1]).to(x) / 2
        levels = torch.bucketize(rounded, middle).flatten()
        self.level_counts += levels.bincount(minlength=len(self.levels)).cpu()

    def to_dict(self) -> dict[str, Any]:
        """Return the histogram as a dictionary for JSON.

        `clipped_share` is the share of the values that lie more than half a step beyond an end of
        the grid. `level_counts` holds the number of values that were rounded to each level, if the
        format has few levels.
        """
        total = max(1, int(self.counts.sum()))
        fields = {
            "levels": [round(level, 6) for level in self.levels.tolist()],
            "low": self.low,
            "high": self.high,
            "counts": self.counts.tolist(),
            "clipped_share": self.num_clipped / total,
        }
        if len(self.levels) <= MAX_COUNTED_LEVELS:
            fields["level_counts"] = self.level_counts.tolist()
        return fields


class HistogramTask(ReplayTask):
    """Computes a histogram of every activation over all calls, in units of its scales.

    Args:
        pipeline: The pipeline.
        activations: The quantizers of the activations, by name.

    Example:
        >>> task = HistogramTask(pipeline, activations)
        >>> trainer.test(task, steps)
        >>> task.histograms["proj_out"].to_dict()
    """

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, FakeQuantize]) -> None:
        super().__init__(pipeline, activations)
        self.histograms: dict[str, Histogram] = {}
        for name, fake_quant in activations.items():
            self.histograms[name] = create_histogram(fake_quant)

    @torch.no_grad()
    def on_activation(self, name: str, timestep: float, x: Tensor, out: Tensor) -> None:
        fake_quant = self.activations[name]
        quantizer, qparams = fake_quant.quantizer, fake_quant.qparams
        if qparams is None:
            qparams = quantizer.resolve_format(x).compute_qparams(x)
        split = quantizer.granularity.split
        values = qparams.to_grid(split(x).float())
        self.histograms[name].add(values, qparams.to_grid(split(out).float()))

    def get_progress(self) -> dict[str, Any]:
        progress = {}
        for name, histogram in self.histograms.items():
            progress[name] = {
                "counts": histogram.counts,
                "level_counts": histogram.level_counts,
                "num_clipped": histogram.num_clipped,
            }
        return progress

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        for name, values in progress.items():
            vars(self.histograms[name]).update(values)


def create_histogram(fake_quant: FakeQuantize) -> Histogram:
    """Return an empty histogram for all candidate formats of a quantizer."""
    values = [fmt.values() for fmt in candidate_formats(fake_quant.quantizer)]
    return Histogram(torch.cat(values).unique())


@torch.no_grad()
def compute_weight_histogram(layer: QuantLayer, original: Float[Tensor, "o k"]) -> Histogram:
    """Compute the histogram of a layer's original weight on the grid of its hard weight.

    Args:
        layer: A layer with its hard weight.
        original: The weight in full precision, to which the layer's transforms are applied.
    """
    fake_quant = layer.weight_fake_quant
    split, qparams = fake_quant.quantizer.granularity.split, fake_quant.qparams
    assert qparams is not None, "load the layer first"
    histogram = Histogram(fake_quant.format.values())
    weight = qparams.to_grid(split(layer.transform_weight(original)))
    histogram.add(weight, qparams.to_grid(split(layer.weight_matrix).float()))
    return histogram


def copy_weights(layers: Mapping[str, nn.Module]) -> dict[str, Float[Tensor, "o k"]]:
    """Return copies of the weights as matrices of output channels and inputs."""
    copies = {}
    for name, layer in layers.items():
        copies[name] = layer.weight.detach().flatten(1).clone()  # pyright: ignore
    return copies
