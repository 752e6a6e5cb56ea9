"""Watch where activations lie on their grids while captured calls are replayed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4dit.grid import Grid
from fp4dit.histograms import of_grid
from fp4dit.models.base import Pipeline
from fp4dit.tasks.activate import Replay


class Watch(Replay):
    """A `Histogram` of every activation over all calls, each value in units of the scale that it is quantized with."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Grid]) -> None:
        super().__init__(pipeline, activations)
        self.found = {name: of_grid(grid) for name, grid in activations.items()}

    @torch.no_grad()
    def see(self, name: str, timestep: float, x: Tensor, out: Tensor) -> None:
        grid = self.activations[name]
        quantizer = grid.quantizer.settled(x)
        scaling = grid.scaling or quantizer.scaling(x)
        on_grid = lambda values: scaling.to_grid(quantizer.granularity.split(values).float())
        self.found[name].add(on_grid(x), on_grid(out))
