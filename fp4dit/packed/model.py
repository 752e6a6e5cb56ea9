"""Description of a packed model: which layers and activations are quantized, and by what.

With it an empty model is prepared so that the tensors of a checkpoint can be loaded into it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp4dit.packed.encoding.layout import Layout
from fp4dit.packed.nn.linear import PackedLinear, make_empty_layer
from fp4dit.packed.nn.token_quant import CachedFakeQuantize
from fp4dit.quantization.apply import ActivationSlot, find_activation_slots
from fp4dit.quantization.attention import QuantProcessor
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import check_quantizable
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import TimestepRangeLinear, base_layer_name
from fp4dit.transforms.base import TransformSpec
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class WeightGroup:
    """Layers with the same layout and transforms.

    Attributes:
        layers: The names of the layers.
        layout: The layout of their buffers.
        transforms: The specs of their transforms, in order.
        timestep_boundaries: The timesteps between ranges. If there are any, each layer stands for
            one range, and all ranges of a layer follow each other in `layers`.
    """

    layers: Sequence[str]
    layout: Layout
    transforms: Sequence[TransformSpec]
    timestep_boundaries: Sequence[int | float]


@dataclass(frozen=True)
class InputGroup:
    """Activations that are quantized by the same rule.

    Attributes:
        names: The names of the activations, as `find_activation_slots` gives them.
        rule: The rule.
    """

    names: Sequence[str]
    rule: Rule


@dataclass(frozen=True)
class ModelDescription:
    """Everything that is quantized in a packed model.

    Attributes:
        weights: The layers, group by group.
        inputs: The activations, group by group.
    """

    weights: Sequence[WeightGroup]
    inputs: Sequence[InputGroup]


def describe_model(
    layers: Mapping[str, PackedLinear],
    weight_rules: Mapping[str, Rule],
    input_rules: Mapping[str, Rule],
) -> ModelDescription:
    """Describe a packed model.

    Args:
        layers: The packed layers, by name.
        weight_rules: The rules that quantized them, by layer.
        input_rules: The rules of the quantized activations, by activation.
    """
    layers_by_kind: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        kind = (repr(layer.layout), repr(weight_rules[base_layer_name(name)]))
        layers_by_kind.setdefault(kind, []).append(name)
    weights = []
    for names in layers_by_kind.values():
        rule, layout = weight_rules[base_layer_name(names[0])], layers[names[0]].layout
        weights.append(
            WeightGroup(
                tuple(names), layout, tuple(rule.transforms), tuple(rule.timestep_boundaries)
            )
        )
    inputs_by_rule: dict[str, list[str]] = {}
    for name, rule in input_rules.items():
        inputs_by_rule.setdefault(repr(rule), []).append(name)
    inputs = [InputGroup(tuple(names), input_rules[names[0]]) for names in inputs_by_rule.values()]
    return ModelDescription(tuple(weights), tuple(inputs))


def insert_packed_layers_(
    model: nn.Module, description: ModelDescription, dtype: torch.dtype
) -> dict[str, PackedLinear]:
    """Put empty packed layers and activation quantizers into a model without weights, in place.

    Returns:
        The packed layers, by name.

    Raises:
        UserError: if the model has no such layers.
    """
    context, packed = TimestepContext(), {}
    for group in description.weights:
        for name in group.layers:
            packed[name] = make_described_layer(model, name, group)
            packed[name].dtype = dtype
            packed[name].share_context(context)
    if needs_timestep(packed.values(), description):
        context.attach(model)
    for group in description.weights:
        for name in dict.fromkeys(map(base_layer_name, group.layers)):
            if group.timestep_boundaries:
                model.set_submodule(name, join_ranges(name, packed, group, context))
            else:
                model.set_submodule(name, packed[name])
    install_input_quantizers_(model, description.inputs, context)
    return packed


def needs_timestep(layers: Iterable[PackedLinear], description: ModelDescription) -> bool:
    """Return whether anything in a packed model depends on the timestep."""
    return (
        any(group.timestep_boundaries for group in description.weights)
        or any(group.rule.per_timestep for group in description.inputs)
        or any(transform.needs_timestep for layer in layers for transform in layer.transform_chain)
    )


def make_described_layer(model: nn.Module, name: str, group: WeightGroup) -> PackedLinear:
    """Make an empty packed layer in place of a model's layer.

    Raises:
        UserError: if the model has no such layer, or if the description does not fit it.
    """
    source = find_submodule(model, base_layer_name(name))
    if not isinstance(source, nn.Linear | nn.Conv2d):
        raise UserError(
            f"{name} is not a layer of {type(model).__name__}: the checkpoint is of another model"
        )
    shape = (source.weight.shape[0], source.weight[0].numel())
    try:
        check_quantizable(source)
        return make_empty_layer(source, group.layout, [spec(*shape) for spec in group.transforms])
    except ValueError as error:
        raise UserError(
            f"{name} of {type(model).__name__} cannot be what the checkpoint says: {error}"
        ) from error


def find_submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return the submodule of this name, or None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def join_ranges(
    name: str, packed: Mapping[str, PackedLinear], group: WeightGroup, context: TimestepContext
) -> TimestepRangeLinear:
    """Join the packed layers of all ranges of timesteps into one layer.

    Raises:
        UserError: if a range is missing.
    """
    names = [f"{name}.ranges.{i}" for i in range(len(group.timestep_boundaries) + 1)]
    for range_name in names:
        if range_name not in packed:
            raise UserError(
                f"the checkpoint describes no {range_name}, and {name} has {len(names)} ranges"
            )
    return TimestepRangeLinear([packed[name] for name in names], group.timestep_boundaries, context)


def install_input_quantizers_(
    model: nn.Module, inputs: Sequence[InputGroup], context: TimestepContext
) -> None:
    """Install the activation quantizers of a description, in place.

    Raises:
        UserError: if the model has no such activation.
    """
    install_attention_processors_(model, inputs)
    slots = find_activation_slots(model)
    for group in inputs:
        rule = group.rule
        shared = None
        if rule.quantizer and not rule.observer:
            shared = CachedFakeQuantize(rule.quantizer)
        for name in group.names:
            slot: ActivationSlot | None = slots.get(name)
            if slot is None or rule.quantizer is None:
                raise UserError(
                    f"{name} is not an activation of {type(model).__name__} that can be quantized"
                )
            fake_quant = shared or rule.make_fake_quantize(context)
            slot.install(fake_quant, rule)


def install_attention_processors_(model: nn.Module, inputs: Sequence[InputGroup]) -> None:
    """Install a quantizing processor in each attention whose q, k or v is quantized, in place."""
    attention_names = set()
    for group in inputs:
        for name in group.names:
            owner, _, operand = name.rpartition(".")
            if operand in ("q", "k", "v"):
                attention_names.add(owner)
    for name, module in list(model.named_modules()):
        if name in attention_names and hasattr(module, "set_processor"):
            attention: Any = module
            attention.set_processor(QuantProcessor(attention.processor))


def uncastable_state_keys(model: nn.Module) -> set[str]:
    """Return the state dict keys of a packed model that must not be cast to another dtype.

    These are all tensors of packed layers and activation quantizers except biases.
    """
    keys = set()
    for prefix, module in model.named_modules():
        if isinstance(module, PackedLinear | FakeQuantize):
            keys |= {f"{prefix}.{name}" for name in module.state_dict() if name != "bias"}
    return keys
