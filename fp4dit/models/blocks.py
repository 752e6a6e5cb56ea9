"""Transformer blocks as units that can be called one by one, and the calls that reach them."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fp4dit.data.columns import RowIndex, RowSource
from fp4dit.utils.calls import Call

T = TypeVar("T")

# Named activations of one batch of calibration calls, with one row per sample.
ActivationState = dict[str, Tensor]
ReadOnlyState = Mapping[str, Tensor]

# Named activations of all calibration calls, in memory or in files.
RowSources = Mapping[str, RowSource]


def flatten_outputs(output: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a module's output in order, however they are nested."""
    return tuple(value for value in tree_leaves(output) if isinstance(value, Tensor))


def read_all_outputs(output: Any, count: int) -> tuple[Tensor, ...]:
    """Return the tensors of a module's output, all of which have one row per sample."""
    return flatten_outputs(output)


@dataclass(frozen=True)
class Unit:
    """A part of the model that is reconstructed at once, such as a transformer block.

    Args:
        module: The name of the module in the model.
        inputs: The names of the activations that the unit reads.
        make_call: Makes the call of the module from the activations among `inputs` that the
            model has.
        outputs: The names of the activations that the module returns, in order.
        read_outputs: Returns these activations, each with one row per sample, from what the module
            returns and the number of samples.

    Example:
        >>> def make_call(state):
        ...     return Call((state["hidden"],), {"timestep": state["timestep"]})
        >>> unit = Unit("blocks.0", ("hidden", "timestep"), make_call, ("hidden",))
    """

    module: str
    inputs: tuple[str, ...]
    make_call: Callable[[ReadOnlyState], Call]
    outputs: tuple[str, ...]
    read_outputs: Callable[[Any, int], tuple[Tensor, ...]] = read_all_outputs

    @property
    def label(self) -> str:
        """The name of the module in messages. The model itself has an empty name."""
        return self.module or "the transformer"

    def contains(self, name: str) -> bool:
        """Return whether a module of this name is the unit's module, or inside it."""
        return not self.module or name == self.module or name.startswith(f"{self.module}.")

    def select_inputs(self, columns: RowSources, index: RowIndex) -> ActivationState:
        """Return the rows `index` of the activations that the unit reads."""
        return select_rows(select_columns(self.inputs, columns), index)


def copy_repeated_modules(model: nn.Module, units: Sequence[Unit]) -> dict[int, nn.Module]:
    """Copy the modules of the units that an earlier unit contains, or is inside of.

    When it is their turn, layers of the earlier unit are quantized.

    Returns:
        The modules by the numbers of the units, from 1.
    """
    copies = {}
    for i, unit in enumerate(units):
        if any(x.contains(unit.module) or unit.contains(x.module) for x in units[:i]):
            copies[i + 1] = copy.deepcopy(model.get_submodule(unit.module))
    return copies


def make_simple_unit(module: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Unit:
    """Make a unit whose module takes all its inputs as positional arguments, in order.

    Example:
        >>> unit = make_simple_unit("pos_embed", ("latent",), ("hidden",))
    """

    def make_call(state: ReadOnlyState) -> Call:
        return Call(tuple(state[name] for name in inputs), {})

    return Unit(module, inputs, make_call, outputs)


def split_by_unit(by_layer: Mapping[str, T], units: Sequence[Unit]) -> list[dict[str, T]]:
    """Return the entries of each unit's layers. A layer belongs to the first unit that contains it.

    A model may run a module, or a part of one, a second time. The second run is a unit without
    layers.
    """
    remaining, parts = dict(by_layer), []
    for unit in units:
        names = [name for name in remaining if unit.contains(name)]
        parts.append({name: remaining.pop(name) for name in names})
    return parts


def select_columns(names: Collection[str], columns: Mapping[str, T]) -> dict[str, T]:
    """Return the columns that have one of the names; a name without a column is ignored."""
    return {name: column for name, column in columns.items() if name in names}


def select_rows(columns: RowSources, index: RowIndex) -> ActivationState:
    """Read the same rows of every column."""
    return {name: column[index] for name, column in columns.items()}


def to_device(device: torch.device | str, state: ReadOnlyState) -> ActivationState:
    """Return a copy of the state whose tensors are on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in state.items()}


def read_noise_channels(
    output: Float[Tensor, "n tokens values"], transformer: Any
) -> Float[Tensor, "n noise"]:
    """Return the predicted noise of each sample, without the variance that a model predicts beside.

    The last layer of PixArt, DiT and HunyuanDiT returns a patch for each token. The channels of a
    pixel lie next to each other, those of the noise before those of the variance, which samplers
    do not read.

    Args:
        output: The output of the last layer.
        transformer: The transformer.
    """
    pixels = output.unflatten(-1, (-1, transformer.out_channels))
    return pixels[..., : transformer.config.in_channels].flatten(1)


def count_rows(columns: RowSources) -> int:
    """Return the number of rows, which is the same in all columns."""
    return len(next(iter(columns.values())))
