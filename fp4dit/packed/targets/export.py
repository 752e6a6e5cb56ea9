"""Store a packed transformer in the format of another library."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fp4dit.packed.model import uncastable_state_keys
from fp4dit.packed.nn.linear import PackedConv, PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel, Target
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.rules import find_layers
from fp4dit.quantization.timestep_ranges import base_layer_name
from fp4dit.utils.errors import UserError

MAX_NAMES_SHOWN = 20  # layer names in one line

PLAIN_LAYERS = (nn.Linear, nn.Conv2d)  # readers replace these, and none of their subclasses


def store_model(
    model: nn.Module,
    target: Target,
    config: Mapping[str, Any],
    skeleton: nn.Module,
    dtype: torch.dtype,
    dense: Sequence[str] = (),
) -> StoredModel:
    """Store a packed model. Its weights are exact in `dtype`.

    Args:
        model: The packed model.
        target: The format.
        config: The config of the plain model.
        skeleton: The plain model, without weights.
        dtype: The dtype in which readers load the model.
        dense: Patterns of the names of packed layers that are stored as plain weights.

    Raises:
        UserError: if a layer cannot be stored. The message names all such layers, with the reasons.
    """
    target.check_model(type(skeleton).__name__)
    others = list_unpacked_tensors(model)
    layers: dict[str, StoredLayer] = {}
    refused: dict[str, list[str]] = {}
    for name, layer in list_packed_layers(model).items():
        source = skeleton.get_submodule(name)
        shape = tuple(source.weight.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if any(fnmatchcase(name, pattern) for pattern in dense):
            others[f"{name}.weight"] = dequantize_weight(name, layer).view(shape)
            continue
        try:
            if type(source) not in PLAIN_LAYERS:
                raise UserError(f"it is a {type(source).__name__}, which no reader replaces")
            layers[name] = target.store(layer, shape, dtype)
        except UserError as error:
            refused.setdefault(str(error), []).append(name)
    if refused:
        raise UserError(explain_refusals(target, refused))
    if not layers:
        raise UserError(
            "no packed layer is left: give a folder that targets=[export] made, and name fewer in "
            "dense"
        )
    left = [name for name in find_layers(skeleton) if name not in layers]
    stored = StoredModel(config, dtype, layers, others, left)
    target.check_stored(stored)
    return stored


def list_unpacked_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a packed model that are not part of its quantization, by name."""
    quantized = uncastable_state_keys(model)
    tensors = {}
    for name, value in model.state_dict().items():
        if name not in quantized:
            tensors[state_key_without_wrapper(name, model)] = value
    return tensors


def list_packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed layers of a model, by name.

    Raises:
        UserError: if a layer belongs to a range of timesteps.
    """
    packed = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        if base_layer_name(name) != name:
            raise UserError(
                f"{name} is for one range of timesteps, and no other format has several layers for "
                "one"
            )
        packed[name] = layer
    return packed


def state_key_without_wrapper(name: str, model: nn.Module) -> str:
    """Return a state key without the wrapper of norms whose input is quantized.

    A quantizer before a norm of q or k makes `nn.Sequential(quantizer, norm)` of the norm.
    """
    owner, _, rest = name.rpartition(".1.")
    if not owner:
        return name
    module = model.get_submodule(owner)
    is_wrapper = isinstance(module, nn.Sequential) and isinstance(module[0], FakeQuantize)
    return f"{owner}.{rest}" if is_wrapper else name


def dequantize_weight(name: str, layer: PackedLinear) -> Tensor:
    """Return the weight of a layer in its dtype, with the shape that the plain layer has.

    Raises:
        UserError: if the layer transforms its input.
    """
    if layer.transform_chain:
        raise UserError(
            f"{name} transforms its input, so its weight alone is not the layer: it cannot be "
            "converted"
        )
    weight = layer.dequantize(layer.dtype)
    if isinstance(layer, PackedConv):
        return weight.unflatten(1, (-1, *layer.geometry.kernel_size))
    return weight


def describe_export(model: nn.Module, target: Target, stored: StoredModel) -> Iterator[str]:
    """Yield notes on a stored transformer: what is exact, and what readers do otherwise."""
    kinds: dict[str, int] = {}
    for layer in stored.layers.values():
        kind = target.describe(layer)
        kinds[kind] = kinds.get(kind, 0) + 1
    dtype = str(stored.dtype).removeprefix("torch.")
    for kind, count in kinds.items():
        layers = "1 layer is" if count == 1 else f"{count} layers are"
        yield f"{layers} {kind}, with weights that are exact in {dtype}"
    yield from describe_inputs(model, target, stored)
    layer_inputs = {id(layer.input_fake_quant) for layer in list_packed_layers(model).values()}
    for module in model.modules():
        if isinstance(module, FakeQuantize) and id(module) not in layer_inputs:
            yield "the operands of attention are quantized here, and not by readers of this folder"
            return


def describe_inputs(model: nn.Module, target: Target, stored: StoredModel) -> Iterator[str]:
    """Yield notes on the inputs of layers that are quantized here."""
    described = {name for name, layer in stored.layers.items() if target.stores_input(layer)}
    quantized = set()
    for name, layer in list_packed_layers(model).items():
        if isinstance(layer.input_fake_quant, FakeQuantize):
            quantized.add(name)
    if described:
        yield (
            f"the inputs of {len(described)} layers are described, and quantized bit-exactly as "
            "here"
        )
    only_there = set()
    for name, layer in stored.layers.items():
        if name not in quantized and target.quantizes_input(layer):
            only_there.add(name)
    if only_there:
        yield (
            f"the inputs of {len(only_there)} layers are not quantized here, and by readers of "
            f"{target.name} they are: {target.inputs_note}"
        )
    if quantized - described:
        yield (
            f"the inputs of {len(quantized - described)} layers are quantized here, in a way that "
            f"{target.name} cannot describe: {target.inputs_note}"
        )


def explain_refusals(target: Target, refused: Mapping[str, Sequence[str]]) -> str:
    """Return the message for all refused layers, by reason.

    All of them are listed at once, so that the user can name them in `dense` at once.
    """
    lines = [f"{format_names(names)}: {reason}" for reason, names in refused.items()]
    lines.append(
        f"{target.name} cannot hold these layers exactly. Do what is said above, choose another "
        "dtype, or name those that do not transform their input in export_format.dense=[...]"
    )
    return "\n".join(lines)


def format_names(names: Sequence[str]) -> str:
    """Return names separated by commas, shortened if there are many."""
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    rest = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
