"""Report what is quantized, in which format, at how many bits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.quantization.fake_quant import candidate_formats
from fp4dit.quantization.layers import QuantLayer, check_quantizable
from fp4dit.quantization.rules import (
    Rule,
    assign_rules,
    find_layers,
    match_rules,
    naming_layer_errors,
)
from fp4dit.utils.errors import UserError


def check_bits(name: str, rule: str, quantizer: Quantizer, shape: torch.Size) -> float:
    """Return the bits per value of a tensor, with its scales.

    Raises:
        UserError: if the granularity or the format does not fit; the message names the layer.
    """
    with naming_layer_errors(name, rule):
        block = torch.zeros(1, quantizer.granularity.width(shape))  # faster than on the meta device
        for fmt in candidate_formats(quantizer):
            fmt.nearest(block)
        return quantizer.bits_per_value(shape)


@dataclass(frozen=True)
class LayerAudit:
    """Row of an audit, for a layer or an activation.

    Attributes:
        name: The name of the layer or activation.
        rule: The pattern of its rule; "-" if it has none.
        format: The name of its number format.
        bits: The bits per value, with scales; the sum over the copies of a weight, if the layer has
            one for each timestep range.
        values: The number of values of the activation, or of one copy of the weight.
    """

    name: str
    rule: str
    format: str
    bits: float
    values: int


def audit_weights(model: nn.Module, rules: Sequence[Rule]) -> list[LayerAudit]:
    """Return an audit of what `quantize_weights_` would do, without touching a weight.

    The model may be on the meta device.

    Raises:
        UserError: if no layer would be quantized, a rule is unused, or a granularity does not fit.
    """
    layers = find_layers(model)
    assigned = assign_rules(layers, rules)
    if not any(rule.quantizer for rule in assigned.values()):
        raise UserError(
            "no layer is quantized: give `weight` a rule that matches, or choose method=fp16 on "
            "purpose"
        )
    return [audit_layer(name, layer, assigned.get(name)) for name, layer in layers.items()]


def audit_layers(model: nn.Module, rules: Sequence[Rule]) -> list[LayerAudit]:
    """Return the audit of the weights; without rules, all of them are in full precision.

    Raises:
        UserError: as `audit_weights` does, if there are rules.
    """
    if rules:
        return audit_weights(model, rules)
    return [audit_layer(name, layer, None) for name, layer in find_layers(model).items()]


def audit_layer(name: str, layer: nn.Module, rule: Rule | None) -> LayerAudit:
    """Return the row of one layer."""
    weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
    if rule is None or rule.quantizer is None:
        return LayerAudit(name, rule.match if rule else "-", "fp16", 16.0, weight.numel())
    shape = torch.Size([len(weight), weight[0].numel()])
    with naming_layer_errors(name, rule.match):
        check_quantizable(layer)
        transform_bits = sum(spec(*shape).storage_bits() for spec in rule.transforms)
    bits = check_bits(name, rule.match, rule.quantizer, shape) + transform_bits / weight.numel()
    copies = 1 + len(rule.timestep_boundaries)
    return LayerAudit(name, rule.match, rule.quantizer.format.name, copies * bits, weight.numel())


def audit_activation_shapes(
    shapes: Mapping[str, torch.Size], rules: Sequence[Rule]
) -> list[LayerAudit]:
    """Return the audit of the activations of these shapes that the rules quantize."""
    audits = []
    for name, rule in match_rules(shapes, rules).items():
        if rule.quantizer:
            shape = shapes[name]
            bits, fmt = rule.bits_per_value(shape), rule.quantizer.format
            audits.append(LayerAudit(name, rule.match, fmt.name, bits, shape.numel()))
    return audits


def with_chosen_formats(model: nn.Module, audits: Sequence[LayerAudit]) -> list[LayerAudit]:
    """Return the audit of a quantized model, with the formats that its data selected."""
    chosen = []
    for audit in audits:
        layer = model.get_submodule(audit.name)
        if isinstance(layer, QuantLayer):
            audit = replace(audit, format=layer.weight_fake_quant.format.name)
        chosen.append(audit)
    return chosen


def effective_bits(audits: Sequence[LayerAudit]) -> float:
    """Return the mean bits per weight of all audited layers."""
    total = sum(audit.bits * audit.values for audit in audits)
    return total / sum(audit.values for audit in audits)


def checkpoint_bytes(model: nn.Module, audits: Sequence[LayerAudit]) -> int:
    """Return the size of a packed model: layers at their bits, other parameters at 16 bits."""
    packed = sum(audit.bits * audit.values for audit in audits)
    audited = sum(audit.values for audit in audits)
    other = sum(p.numel() for p in model.parameters()) - audited
    return math.ceil((packed + 16 * other) / 8)


def audit_to_dicts(audits: Sequence[LayerAudit]) -> list[dict[str, Any]]:
    return [asdict(audit) for audit in audits]
