"""Inputs of the quantized layers of a unit, read while the unit computes its calibration rows."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.data.segments import iter_batches
from fp4dit.quantization.layers import QuantLayer
from fp4dit.utils.calls import remove_hooks


@torch.no_grad()
def iter_layer_inputs(
    module: nn.Module,
    layers: Sequence[QuantLayer],
    dataset: UnitDataset,
    index: Int[Tensor, "n"],
    batch_size: int,
) -> Iterator[list[Float[Tensor, "b t k"] | None]]:
    """Yield the inputs of each layer's matmul while `module` computes the given rows.

    Args:
        module: The unit's module.
        layers: The layers inside the module.
        dataset: The unit's data.
        index: The numbers of the rows.
        batch_size: The number of rows of one forward pass.

    Yields:
        For each batch, an input for each layer; None for a layer that the module did not call.
    """
    inputs: list[Tensor | None] = [None] * len(layers)

    def hook(i: int, _module: nn.Module, _args: Any, x: Tensor) -> None:
        inputs[i] = x.reshape(len(x), -1, x.shape[-1])

    def group_by_row(x: Tensor | None, rows: int) -> Tensor | None:
        """Group the vectors of an input by the row that they belong to.

        The input of a layer for one timestep range has fewer rows than the batch. It is returned
        unchanged.
        """
        if x is None or len(x) % rows:
            return x
        return x.reshape(rows, -1, x.shape[-1])

    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.input_fake_quant.register_forward_hook(partial(hook, i)))
    with remove_hooks(hooks):
        for batch in iter_batches(dataset.inputs, index, batch_size):
            inputs[:] = [None] * len(layers)
            dataset.make_call(batch, layers[0].weight.device)(module)
            yield [group_by_row(x, len(batch)) for x in inputs]
