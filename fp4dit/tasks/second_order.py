"""Fit hard weights by the second moment of their inputs: one pass over the calibration rows, and no gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.examples import Examples, inputs
from fp4dit.footprint import Pass, Work
from fp4dit.gptq import Matrix, Order, as_given, gptq
from fp4dit.layer import QuantLayer
from fp4dit.resume import Trainers
from fp4dit.tasks.reconstruct import Curve, blank


@dataclass(frozen=True)
class SecondOrder:
    """GPTQ (arXiv:2210.17323) of each layer, for the inputs that it has while the unit's weights are not yet rounded.

    Calibration rows pass `batch` at a time. A layer that they do not reach is rounded to nearest. The rest is
    explained at `fp4dit.gptq.gptq`.
    """

    damping: float = 0.01
    block: int = 128
    order: Order = as_given
    batch: int = 16

    def check(self, layers: Sequence[QuantLayer]) -> None:
        """Raises UserError for a format in which a value depends on its neighbours: channels are rounded one by one."""
        for block, fmt, _ in blank(layers):
            fmt.bracket(block)

    def work(self, unit: Pass, rows: int) -> Work:
        """A pass over the rows, and the moments, which cost about as much again; all moments, and an inverse with its
        factor, in fp32. Not counted is the loop over channels, which takes half of the time on a small model."""
        sides = [layer.rows.shape[1] for layer in unit.layers]
        moments = sum(4 * k**2 for k in sides) + 8 * max(sides) ** 2
        return Work(2 * rows * unit.flops, self.batch * unit.widest + moments)

    def __call__(self, module: nn.Module, layers: list[QuantLayer], examples: Examples, trainers: Trainers) -> Curve:
        moments = second_moments(module, layers, examples, self.batch)
        for layer in layers:
            scaling, moment = layer.grid.scaling, moments.pop(0)
            assert scaling is not None, "prepare the layer first"
            if moment is not None:
                fmt = layer.grid.format
                layer.write(gptq(layer.rows, moment, scaling, fmt, self.block, self.damping, self.order))
            layer.freeze()
        return []


@torch.no_grad()
def second_moments(module: nn.Module, layers: list[QuantLayer], examples: Examples, batch: int) -> list[Matrix | None]:
    """The sum of x x^T over what each layer multiplies, in fp32; None for a layer that is not reached."""
    moments: list[Matrix | None] = [None] * len(layers)
    for found in inputs(module, layers, examples, examples.trained, batch):
        products: dict[tuple, Matrix] = {}  # layers that read one tensor, as q, k and v do, share the work
        for i, x in enumerate(found):
            if x is None:
                continue
            place = (x.data_ptr(), x.shape, x.stride())
            if place not in products:
                products[place] = squared(x)
            moment = moments[i]
            moments[i] = products[place].clone() if moment is None else moment.add_(products[place])
    return moments


def squared(x: Float[Tensor, "... k"]) -> Matrix:
    tokens = x.flatten(0, -2).float()
    return tokens.T @ tokens
