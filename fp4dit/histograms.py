"""How a layer's values lie on the grid of their format."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.grid import Grid, formats
from fp4dit.layer import QuantLayer

BINS = 96
MARGIN = 1 / 8  # of the grid's length, on either side of it
FEW = 64  # levels, up to which it is worth telling how often each is taken


class Histogram:
    """Counts of values in units of the grid, in `BINS` equal bins from a little below its end to a little above.

    What lies further out is counted in the outermost bin. `taken` counts how often each level is what was rounded to.
    """

    def __init__(self, levels: Float[Tensor, "v"]) -> None:
        self.levels = levels.cpu()
        first, second, *_, before, last = self.levels.tolist()
        # Half a step beyond the end is still rounded to it as to any other level.
        self.ends = first - (second - first) / 2, last + (last - before) / 2
        margin = MARGIN * (last - first)
        self.low, self.high = first - margin, last + margin
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.taken = torch.zeros(len(levels), dtype=torch.int64)
        self.beyond = 0

    def add(self, x: Float[Tensor, "..."], rounded: Float[Tensor, "..."]) -> None:
        """Count values on the grid, and what they were rounded to, both in units of the grid."""
        place = (x - self.low) * (BINS / (self.high - self.low))
        self.counts += place.long().clamp_(0, BINS - 1).flatten().bincount(minlength=BINS).cpu()
        self.beyond += int(((x < self.ends[0]) | (x > self.ends[1])).sum())
        middle = (self.levels[1:] + self.levels[:-1]).to(x) / 2
        self.taken += torch.bucketize(rounded, middle).flatten().bincount(minlength=len(self.levels)).cpu()

    def told(self) -> dict[str, Any]:
        """As JSON can hold it; `beyond` is the share of values that are clipped: more than rounding would move them."""
        total = max(1, int(self.counts.sum()))
        few = {"taken": self.taken.tolist()} if len(self.levels) <= FEW else {}
        levels = [round(level, 6) for level in self.levels.tolist()]
        return {
            "levels": levels,
            "low": self.low,
            "high": self.high,
            "counts": self.counts.tolist(),
            "beyond": self.beyond / total,
            **few,
        }


def of_grid(grid: Grid) -> Histogram:
    """For any format that the grid may turn out to have."""
    return Histogram(torch.cat([fmt.values() for fmt in formats(grid.quantizer)]).unique())


@torch.no_grad()
def of_weight(layer: QuantLayer, original: Float[Tensor, "o k"]) -> Histogram:
    """The original weight, after the layer's transforms, on the grid that its hard weight lies on."""
    split, scaling = layer.grid.quantizer.granularity.split, layer.grid.scaling
    assert scaling is not None, "load the layer first"
    found = Histogram(layer.grid.format.values())
    found.add(scaling.to_grid(split(layer.changed(original))), scaling.to_grid(split(layer.rows).float()))
    return found


def originals(layers: Mapping[str, nn.Module]) -> dict[str, Float[Tensor, "o k"]]:
    """Copies of the weights, output channels by what each sums over, to be kept beside what they become."""
    return {name: layer.weight.detach().flatten(1).clone() for name, layer in layers.items()}  # pyright: ignore
