"""Roles of layers: rules that name layers by what they do, for models whose names are not known.

A rule with the pattern `role:before_activation` is for the layers whose output an activation
function reads. `resolve_roles` replaces it by rules with the names of these layers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.quantization.activation_functions import find_activation_neighbours
from fp4dit.quantization.layers import check_quantizable
from fp4dit.quantization.rules import Rule, find_layers, find_rule
from fp4dit.utils.errors import UserError

PREFIX = "role:"

# Layers and operands of attention whose rows the groups of their rule do not divide, or that cannot
# be quantized at all.
INDIVISIBLE = "role:indivisible"

# Layers inside a list of blocks that an activation function comes after, or before, or whose input
# is the output of GELU itself.
BEFORE_ACTIVATION, AFTER_ACTIVATION = "role:before_activation", "role:after_activation"
AFTER_GELU = "role:after_gelu"


def has_roles(rules: Sequence[Rule] | None) -> bool:
    """Return whether a rule names its layers by their role."""
    return any(rule.match.startswith(PREFIX) for rule in rules or ())


def resolve_roles(rules: Sequence[Rule], model: nn.Module) -> list[Rule]:
    """Replace rules for roles by rules for the names of a model's layers.

    Args:
        rules: The rules, for weights or for activations.
        model: The model before it is quantized, possibly on the meta device.

    Raises:
        UserError: if there is an unknown role, or if no layer has the role of a rule that is not
            optional.

    Example:
        >>> rule = Rule("role:before_activation", quantizer)
        >>> [rule.match for rule in resolve_roles([rule], flux)]
        ['transformer_blocks.*.ff.net.0.proj', 'single_transformer_blocks.*.proj_mlp']
    """
    if not has_roles(rules):
        return list(rules)
    found = find_activation_neighbours(model)
    roles = (BEFORE_ACTIVATION, AFTER_ACTIVATION, AFTER_GELU)
    neighbours: dict[str, list[str]] = dict(zip(roles, map(list, found), strict=True))
    expanded: list[Rule] = []
    for rule in rules:
        expanded += name_neighbours(rule, model, neighbours.get(rule.match), [])
    others = [rule for rule in expanded if rule.match != INDIVISIBLE]
    resolved: list[Rule] = []
    for rule in rules:
        if rule.match == INDIVISIBLE:
            resolved += [
                replace(rule, match=name, quantizer=quantizer)
                for name, quantizer in find_indivisible(model, rule, others)
                if find_rule(name, resolved) is None
            ]
        else:
            resolved += name_neighbours(rule, model, neighbours.get(rule.match), resolved)
    return resolved


def name_neighbours(
    rule: Rule, model: nn.Module, layers: Sequence[str] | None, earlier: Sequence[Rule]
) -> list[Rule]:
    """Return rules for the names of layers, without those that earlier rules are for.

    Args:
        rule: The rule.
        model: The model.
        layers: The layers that have the role of the rule; None if it is a rule for names.
        earlier: Rules that come before it.

    Raises:
        UserError: if there is no such role, or if no layer has it.
    """
    if layers is None:
        if rule.match.startswith(PREFIX) and rule.match != INDIVISIBLE:
            known = ", ".join((INDIVISIBLE, BEFORE_ACTIVATION, AFTER_ACTIVATION, AFTER_GELU))
            raise UserError(f"{rule.match} is no role: there are {known}")
        return [rule]
    if not layers and not rule.optional:
        raise UserError(
            f"no layer of {type(model).__name__} was found for {rule.match}: name the layers that "
            "the preset means in model_layers.pre_gelu or model_layers.post_gelu, or give []"
        )
    free = [name for name in layers if find_rule(name, earlier) is None]
    return [replace(rule, match=match) for match in merge_names(free, list(find_layers(model)))]


def find_indivisible(
    model: nn.Module, rule: Rule, others: Sequence[Rule]
) -> Iterator[tuple[str, Quantizer | None]]:
    """Yield the layers and operands that their rule does not fit, and the quantizer they get.

    Args:
        model: The model.
        rule: The rule for what is indivisible.
        others: All other rules.

    Yields:
        The name, and the quantizer of `rule`; None for a layer that cannot be quantized at all.
    """
    layers = find_layers(model)
    for name, width in find_widths(model).items():
        other = find_rule(name, others)
        if other is None or other.quantizer is None:
            continue
        if name in layers and not is_quantizable(layers[name]):
            yield name, None
        elif not is_divisible(other, width):
            yield name, rule.quantizer


def is_quantizable(layer: nn.Module) -> bool:
    """Return whether there is a quantized layer for this one."""
    try:
        check_quantizable(layer)
    except ValueError:
        return False
    return True


def is_divisible(rule: Rule, width: int) -> bool:
    """Return whether the groups and the transforms of a rule fit rows of this many values."""
    assert rule.quantizer is not None
    try:
        rule.quantizer.granularity.width(torch.Size([1, width]))
        for spec in rule.transforms:
            spec(1, width)
    except ValueError:
        return False
    return True


def find_widths(model: nn.Module) -> dict[str, int]:
    """Return the values of a row of each layer, and of a head of each operand of attention."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            widths[name] = module.weight[0].numel()
        elif hasattr(module, "set_processor") and hasattr(module, "heads"):
            for operand in "qkv":
                widths[f"{name}.{operand}"] = module.inner_dim // module.heads  # pyright: ignore
    return widths


def merge_names(names: Sequence[str], all_names: Sequence[str]) -> Iterator[str]:
    """Yield patterns that match these names and no others: a wildcard for the number of a block."""
    remaining = dict.fromkeys(names)
    while remaining:
        name = next(iter(remaining))
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        matched = [other for other in all_names if fnmatchcase(other, pattern)]
        if not all(other in remaining for other in matched):
            pattern, matched = name, [name]
        for other in matched:
            del remaining[other]
        yield pattern
