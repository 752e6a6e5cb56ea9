"""Quantize a bare model from its weights alone, and pack it layer by layer.

No calibration calls are needed, and therefore no pipeline. `fp4dit.rounding.data_free` tells which
rules and rounding methods allow this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fp4dit.numerics.rounding import RoundingFunction, round_to_nearest
from fp4dit.packed.model import ModelDescription, describe_model, install_input_quantizers_
from fp4dit.packed.nn.linear import PackedLinear, pack_layer_
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.audit import LayerAudit, audit_layer, audit_weights
from fp4dit.quantization.fake_quant import candidate_formats
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, naming_layer_errors
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import base_layer_name
from fp4dit.utils.errors import UserError
from fp4dit.utils.modules import copy_to_meta


@dataclass(frozen=True)
class AssignedRules:
    """The rules of a model's layers and activations, checked against the model.

    Attributes:
        weights: The rule of each layer that is quantized, by name.
        inputs: The rule of each activation that is quantized, by name.
        audit: The audit of all layers, quantized or not.
        rounding: The function that rounds each weight.

    Example:
        >>> assigned = assign_transformer_rules(transformer, weight, activation)
        >>> description = quantize_and_pack_(transformer, assigned)
    """

    weights: Mapping[str, Rule]
    inputs: Mapping[str, Rule]
    audit: Sequence[LayerAudit]
    rounding: RoundingFunction = round_to_nearest


def assign_transformer_rules(
    model: nn.Module,
    weight: Sequence[Rule],
    activation: Sequence[Rule] = (),
    rounding: RoundingFunction = round_to_nearest,
) -> AssignedRules:
    """Assign rules to all layers and activations of a transformer, which is not changed.

    Args:
        model: The transformer, with or without weights.
        weight: The rules for weights. They need no calibration.
        activation: The rules for activations, with dynamic scales.
        rounding: The function that rounds each weight.

    Raises:
        UserError: if no layer would be quantized, if a rule is unused or does not fit, or if
            `rounding` cannot round in a format.
    """
    require_layers(model, find_layers(model))
    skeleton = copy_to_meta(model)
    audit = audit_weights(skeleton, weight)
    assigned = assign_rules(find_layers(skeleton), weight)
    for name, layer in quantize_weights_(skeleton, assigned, check=False).items():
        check_rounding(name, layer, assigned[base_layer_name(name)].match, rounding)
    _, inputs = quantize_activations_(skeleton, activation)
    weights = {name: rule for name, rule in assigned.items() if rule.quantizer}
    return AssignedRules(weights, inputs, audit, rounding)


def assign_text_encoder_rules(model: nn.Module, rules: Sequence[Rule]) -> AssignedRules:
    """Assign rules to the layers in the blocks of a text encoder, which is not changed.

    Args:
        model: The text encoder, with or without weights.
        rules: The rules for its weights.

    Raises:
        UserError: if a rule matches nothing, needs calibration or does not fit a layer, or if
            nothing would be quantized.
    """
    check_text_encoder_rules(rules)
    names = list_block_layers(model)
    require_layers(model, names)
    assigned = assign_rules(names, rules)
    audit = []
    for name in names:
        audit.append(audit_layer(name, model.get_submodule(name), assigned.get(name)))
    weights = {name: rule for name, rule in assigned.items() if rule.quantizer}
    if not weights:
        raise UserError(
            "no layer of the text encoder is quantized: give a rule a quantizer, or use "
            "text_encoder=none"
        )
    return AssignedRules(weights, {}, audit)


def quantize_and_pack_(model: nn.Module, assigned: AssignedRules) -> ModelDescription:
    """Quantize a model in place, and pack each layer before the next one is touched.

    Returns:
        The description of the packed model.

    Raises:
        UserError: if a weight is not in memory, holds NaN or infinity, or cannot be packed.
    """
    check_in_memory(model, assigned.weights)
    context, packed = TimestepContext(), {}
    if any(rule.timestep_boundaries for rule in assigned.weights.values()):
        context.attach(model)
    for name, rule in assigned.weights.items():
        for layer_name, layer in quantize_weights_(model, {name: rule}, context=context).items():
            layer.to(layer.weight.device)  # transforms are made on the CPU
            layer.prepare().commit_weight(assigned.rounding)
            packed[layer_name] = pack_layer_(model, layer_name, layer)
    description = describe_model(packed, assigned.weights, assigned.inputs)
    install_input_quantizers_(model, description.inputs, context)
    return description


def check_in_memory(model: nn.Module, names: Mapping[str, Rule]) -> None:
    """Raise a UserError if the weight of one of these layers is offloaded."""
    for name in names:
        if model.get_submodule(name).weight.is_meta:  # pyright: ignore[reportOptionalMemberAccess]
            raise UserError(
                f"the weight of {name} is not in memory: load the model without offloading, "
                "quantize and save it, and offload it when it is loaded again"
            )


def check_text_encoder_rules(rules: Sequence[Rule]) -> None:
    """Raise a UserError if a rule has something that a text encoder cannot have."""
    for rule in rules:
        if rule.transforms or rule.timestep_boundaries:
            raise UserError(
                f"the text_encoder rule {rule.match!r} has transforms or ranges of timesteps: a "
                "text encoder is not calibrated and has no timesteps, its weights are rounded to "
                "nearest as they are"
            )


def check_rounding(name: str, layer: QuantLayer, rule: str, rounding: RoundingFunction) -> None:
    """Raise a UserError if a layer's weight cannot be rounded. The weight is not read."""
    quantizer = layer.weight_fake_quant.quantizer
    block = torch.zeros(1, quantizer.granularity.width(layer.weight_matrix.shape))
    with naming_layer_errors(name, rule):
        for fmt in candidate_formats(quantizer):
            rounding(block, fmt)


def require_layers(model: nn.Module, layers: Sequence[str] | Mapping[str, nn.Module]) -> None:
    """Raise a UserError if there are no layers."""
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no linear layers that can be quantized: give the "
            "quantization config of a transformer or a text encoder"
        )


def list_block_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in lists of blocks.

    Poolers and output projections are not among them.
    """
    names = []
    for name in find_layers(model):
        if any(map(str.isdigit, name.split("."))):
            names.append(name)
    return names


def with_packed_formats(model: nn.Module, audit: Sequence[LayerAudit]) -> list[LayerAudit]:
    """Return the audit of a packed model, with the formats that its weights selected."""
    chosen = []
    for row in audit:
        layer = model.get_submodule(row.name)
        if isinstance(layer, PackedLinear) and len(layer.layout.formats) == 1:
            row = replace(row, format=layer.layout.formats[0].name)
        chosen.append(row)
    return chosen
