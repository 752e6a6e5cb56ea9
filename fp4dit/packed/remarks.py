"""What a person is told of a transformer that is converted."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fp4dit.grid import Grid
from fp4dit.packed.compressed import FORMATS
from fp4dit.packed.layer import PackedLinear

MOST = 20  # names in a line


def remarks(
    model: nn.Module, packed: Mapping[str, PackedLinear], groups: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    described = {name for group in groups.values() if group["input_activations"] for name in group["targets"]}
    for fmt in FORMATS:
        alike = [packed[name] for group in groups.values() if group["format"] == fmt.name for name in group["targets"]]
        if alike:
            yield f"{len(alike)} layers are {fmt.name}, equal to the bit as {alike[0].dtype} has their weights"
    quantized = {name for name, layer in packed.items() if isinstance(layer.activation, Grid)}
    if described:
        yield f"the inputs of {len(described)} layers are described, and quantized to the bit as here"
    if quantized - described:
        yield (
            f"the inputs of {len(quantized - described)} layers are quantized here, in a way that compressed-tensors "
            "cannot describe: who reads this leaves them as they are"
        )
    if any(layer.dtype == torch.float32 for layer in packed.values()):
        yield "the model is of float32, and compressed-tensors itself reads weights as bfloat16"
    own = {id(layer.activation) for layer in packed.values()}
    if any(isinstance(module, Grid) and id(module) not in own for module in model.modules()):
        yield "what attention multiplies is quantized here, and not by who reads this"


def refusal(refused: Mapping[str, Sequence[str]]) -> str:
    """All layers at once, by reason: who names some in dense wants to know of the others."""
    lines = [f"{listed(names)}: {reason}" for reason, names in refused.items()]
    return "\n".join([*lines, "Choose another dtype, or name those that do not transform their input in dense"])


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST])
    return f"{shown} and {len(names) - MOST} more" if len(names) > MOST else shown
