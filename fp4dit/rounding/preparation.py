"""Preparation of a unit's layers for rounding: scales, and transforms fitted to inputs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.token_sample import TokenSample
from fp4dit.data.segments import iter_batches
from fp4dit.models.blocks import Unit
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.observers import spread_indices
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import set_timestep
from fp4dit.quantization.timestep_ranges import base_layer_name, rows_per_range
from fp4dit.utils.calls import remove_hooks
from fp4dit.utils.errors import UserError

SAMPLED_BATCH = 8  # rows of a call of which a sample of tokens is kept


def check_all_reached(rules: Mapping[str, Rule], units: Sequence[Unit]) -> None:
    """Raise an error if a layer with a quantizer belongs to no unit.

    Raises:
        UserError: for the first such layer.
    """
    for name, rule in rules.items():
        if rule.quantizer and not any(unit.contains(name) for unit in units):
            raise UserError(
                f"{name} cannot be quantized, because the model does not run it: "
                f"+weight.ignore=['{name}'] leaves it in 16 bits"
            )


def prepare_layers(
    model: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, QuantLayer],
    dataset: UnitDataset,
    num_sampled: int,
) -> None:
    """Choose scales, and fit transforms to the inputs of the original model's layers.

    Args:
        model: The model that the layers belong to.
        teacher: The unit's module in the original model.
        layers: The quantized layers of the unit.
        dataset: The unit's data.
        num_sampled: The number of training rows that transforms and static scales are fitted to.

    Raises:
        UserError: if a layer needs inputs and the model does not call it.
    """
    local_names = {}
    for name in map(base_layer_name, layers):
        local_names[name] = name.removeprefix(dataset.unit.module).lstrip(".")
    need_inputs = set()
    for name, layer in layers.items():
        if layer.needs_calibration_inputs:
            need_inputs.add(base_layer_name(name))
    rows = dataset.train_rows
    sampled_rows = rows[spread_indices(len(rows), num_sampled)]
    names = [local_names[name] for name in need_inputs]
    inputs = sample_inputs(teacher, names, dataset, sampled_rows)
    timesteps = dataset.inputs["timestep"][sampled_rows]
    for name, local_name in local_names.items():
        x = inputs.get(local_name)
        if name in need_inputs and x is None:
            raise UserError(
                f"{name} cannot be calibrated, because the model does not call it: "
                f"+weight.ignore=['{name}'] leaves it in 16 bits"
            )
        layer_or_ranges = model.get_submodule(name)
        for layer, layer_rows in rows_per_range(layer_or_ranges, timesteps):
            set_timestep(layer, timesteps[layer_rows])
            if x is None or layer_rows.all():
                layer.prepare(x)  # an expert reads a number of tokens that no row divides
            else:
                # A layer may read several vectors for each row.
                vectors = layer_rows.repeat_interleave(len(x) // len(layer_rows))
                layer.prepare(x[vectors])


@torch.no_grad()
def sample_inputs(
    teacher: nn.Module, names: Iterable[str], dataset: UnitDataset, index: Int[Tensor, "n"]
) -> dict[str, Float[Tensor, "n ..."]]:
    """Return the inputs of the teacher's layers at the given rows, or a sample of their tokens.

    Some layers read several vectors for each row, as PixArt-alpha's embeddings of height and width
    do. The vectors of a row then follow one another.

    Args:
        teacher: The unit's module in the original model.
        names: The names of the layers.
        dataset: The unit's data.
        index: The numbers of the rows, in ascending order.
    """
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    batch: Tensor = index

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if dataset.tokens and isinstance(module, nn.Linear) and x.ndim == 3:
            numbers = batch if len(x) == len(batch) else batch[0] + torch.arange(len(x))
            x = dataset.tokens.select_rows(x, numbers)
        inputs[name].append(x)

    hooks = []
    for name in names:
        layer = teacher.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(partial(hook, name)))
    # A sample of tokens is asked for where calls are large, and so few of them run at a time.
    size = SAMPLED_BATCH if dataset.tokens else max(1, len(index))
    if hooks:
        with remove_hooks(hooks):
            for batch in iter_batches(dataset.inputs, index, size):
                dataset.make_call(batch, next(teacher.parameters()).device)(teacher)
    return {name: join_inputs(parts) for name, parts in inputs.items()}


def join_inputs(parts: Sequence[Tensor]) -> Float[Tensor, "n ..."]:
    """Join the inputs of a layer in several calls.

    If the sequences differ in length, all have as many tokens as the shortest one, by a sample.
    """
    if len(parts) == 1:
        return parts[0]
    if all(part.ndim == 3 for part in parts):
        sample = TokenSample(min(part.shape[1] for part in parts))
        parts = [sample.select_rows(part, torch.arange(len(part))) for part in parts]
    return torch.cat(list(parts))
