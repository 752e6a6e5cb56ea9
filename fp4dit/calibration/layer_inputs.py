"""Inputs of the quantized layers of a unit, read while the unit computes its calibration rows."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.token_sample import TokenSample
from fp4dit.data.segments import iter_batches
from fp4dit.quantization.layers import QuantLayer
from fp4dit.utils.calls import remove_hooks


class LayerInput(NamedTuple):
    """Input of a layer's matmul.

    Attributes:
        x: The tokens of each row, or a sample of them.
        factor: What turns a sum over these tokens into an estimate of the sum over all tokens.
    """

    x: Float[Tensor, "b t k"]
    factor: float = 1.0


@torch.no_grad()
def iter_sampled_inputs(
    module: nn.Module,
    layers: Sequence[QuantLayer],
    dataset: UnitDataset,
    index: Int[Tensor, "n"],
    batch_size: int,
) -> Iterator[list[LayerInput | None]]:
    """Yield what `iter_layer_inputs` yields, with the dataset's sample of tokens of each row.

    Layers that read the same tensor get the same sample of it, as the same tensor.
    """
    sample = dataset.tokens
    batches = iter_batches(dataset.inputs, index, batch_size)
    inputs_of_batches = iter_layer_inputs(module, layers, dataset, index, batch_size)
    for batch, inputs in zip(batches, inputs_of_batches, strict=True):
        sampled: dict[tuple, LayerInput] = {}
        yield [x if x is None else sample_input(sample, x, batch, sampled) for x in inputs]


def sample_input(
    sample: TokenSample | None,
    x: Float[Tensor, "b t k"],
    batch: Int[Tensor, "n"],
    sampled: dict[tuple, LayerInput],
) -> LayerInput:
    """Return a sample of a layer's input, which is kept in `sampled` for layers that share it.

    Args:
        sample: Which tokens to take; None for all.
        x: The tokens. They have other rows than the batch if the layer does not read each row.
        batch: The numbers of the batch's rows.
        sampled: The samples of this batch.
    """
    if sample is None:
        return LayerInput(x)
    key = (x.data_ptr(), x.shape, x.stride())
    if key not in sampled:
        numbers = batch if len(x) == len(batch) else batch[0] + torch.arange(len(x))
        sampled[key] = LayerInput(sample.select_rows(x, numbers), sample.factor(x.shape[1]))
    return sampled[key]


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
