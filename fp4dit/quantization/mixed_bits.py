"""Bits of each layer, chosen by how much rounding it changes a model's answers, within a budget.

ViDiT-Q (arXiv:2406.02540) gives each layer 4, 6 or 8 bits by its sensitivity. Here the sensitivity
of a layer is the error of the model's answers to recorded calls while the layer's weight alone is
rounded to nearest. The errors of layers are taken to add up.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fp4dit.quantization.rules import Rule, find_layers, match_rules
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class FormatOption:
    """A format that a layer may have, with what it costs and what it does.

    Attributes:
        format: The name of the format.
        values: The number of values of the layer's weight.
        bits: Bits per value, with scales.
        error: The sum of the squared errors of the model's answers over that of their squares,
            while this layer alone is rounded.
    """

    format: str
    values: int
    bits: float
    error: float


@torch.no_grad()
def measure_options(
    model: nn.Module, rules: Sequence[Sequence[Rule]], calls: Sequence[Call]
) -> dict[str, list[FormatOption]]:
    """Return the options of each layer, one for each list of rules that quantizes it.

    Weights are rounded to nearest, without the transforms of a rule. They are put back afterwards.

    Args:
        model: The model, in full precision.
        rules: Rules for weights, a list of them for each format.
        calls: Calls of the model to measure errors on.

    Example:
        >>> with record_calls(pipe.transformer) as calls:
        ...     images = pipe(prompts, num_inference_steps=4)
        >>> rules = [weight_rules(word, "channel", "minmax") for word in ("uint4", "uint8")]
        >>> options = measure_options(pipe.transformer, rules, calls)
    """
    answers = [read_answer(call(model)) for call in calls]
    power = sum(answer.square().sum().item() for answer in answers)
    layers = find_layers(model)
    matched = [match_rules(layers, rules_of_format) for rules_of_format in rules]
    options: dict[str, list[FormatOption]] = {}
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
        for rules_by_name in matched:
            rule = rules_by_name.get(name)
            if rule is None or rule.quantizer is None:
                continue
            with rounded_to_nearest(layers, {name: rule}):
                error = sum_errors(model, calls, answers) / power
            bits = rule.quantizer.bits_per_value(weight.flatten(1).shape)
            option = FormatOption(rule.quantizer.format.name, weight.numel(), bits, error)
            options.setdefault(name, []).append(option)
    return options


@contextmanager
def rounded_to_nearest(
    layers: Mapping[str, nn.Module], rules: Mapping[str, Rule]
) -> Iterator[None]:
    """Round weights to nearest by rules inside the `with` statement, without transforms."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, rule in rules.items():
            weight: Tensor = layers[name].weight.data  # pyright: ignore[reportAssignmentType]
            kept.append((weight, weight.clone()))
            if rule.quantizer is not None:
                matrix = weight.flatten(1)
                weight.copy_(rule.quantizer.resolve_format(matrix)(matrix).view(weight.shape))
        yield
    finally:
        for weight, original in kept:
            weight.copy_(original)


def read_answer(output: Any) -> Tensor:
    """Return the tensor that a transformer of diffusers answers with, in fp32."""
    return (output if isinstance(output, Tensor) else output[0]).float()


def sum_errors(model: nn.Module, calls: Sequence[Call], answers: Sequence[Tensor]) -> float:
    """Return the sum of the squared differences of a model's answers to these."""
    pairs = zip(calls, answers, strict=True)
    return sum((read_answer(call(model)) - y).square().sum().item() for call, y in pairs)


def allocate_formats(
    options: Mapping[str, Sequence[FormatOption]], budget: float
) -> dict[str, FormatOption]:
    """Return an option for each layer, with a small sum of errors within a budget.

    All layers begin with the fewest bits. Bits go where they reduce the error most for each bit,
    as long as they fit. If the last bits fit exactly, no other choice within the budget has a
    smaller sum of errors; otherwise the sum exceeds the least one by no more than the reduction
    of the first bits that did not fit.

    Args:
        options: The options of each layer.
        budget: Bits per value, as a mean over all values of these layers.

    Raises:
        UserError: if the fewest bits of all layers exceed the budget.

    Example:
        >>> wide = [FormatOption("uint4", 64, 4.0, 0.1), FormatOption("uint8", 64, 8.0, 0.01)]
        >>> robust = [FormatOption("uint4", 64, 4.0, 0.02), FormatOption("uint8", 64, 8.0, 0.01)]
        >>> chosen = allocate_formats({"wide": wide, "robust": robust}, budget=6.0)
        >>> [option.format for option in chosen.values()]
        ['uint8', 'uint4']
    """
    chosen, steps = {}, []
    for name, candidates in options.items():
        frontier = trace_frontier(candidates)
        chosen[name] = frontier[0]
        steps += [(gain_per_bit(*pair), name, *pair) for pair in pairwise(frontier)]
    values = sum(option.values for option in chosen.values())
    left = budget * values - sum(option.values * option.bits for option in chosen.values())
    if left < 0:
        fewest = budget - left / values
        raise UserError(
            f"{budget:g} bits is less than the {fewest:.2f} bits of the smallest formats"
        )
    for _, name, before, after in sorted(steps, key=lambda step: -step[0]):
        cost = after.values * (after.bits - before.bits)
        if chosen[name] is before and cost <= left * (1 + 1e-9):
            chosen[name], left = after, left - cost
    return chosen


def gain_per_bit(before: FormatOption, after: FormatOption) -> float:
    """Return how much the error is reduced by each bit that a layer takes more."""
    return (before.error - after.error) / (after.values * (after.bits - before.bits))


def trace_frontier(candidates: Sequence[FormatOption]) -> list[FormatOption]:
    """Return the options of a layer that some price of a bit makes the best, by rising bits."""
    frontier = [min(candidates, key=lambda option: (option.bits, option.error))]
    while better := [
        option
        for option in candidates
        if option.bits > frontier[-1].bits and option.error < frontier[-1].error
    ]:
        frontier.append(max(better, key=lambda option: gain_per_bit(frontier[-1], option)))
    return frontier


def list_layer_options(
    chosen: Mapping[str, FormatOption], ungroupable: Sequence[str] = (), default: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return the `layers` of a weight config that give each layer its format.

    Args:
        chosen: The option of each layer.
        ungroupable: The names of layers that have one scale per output channel.
        default: The format that the weight config gives all layers, which needs no exception.

    Example:
        >>> list_layer_options({"proj_out": FormatOption("uint8", 64, 8.0, 0.01)})
        {'uint8': {'match': ['proj_out'], 'format': 'uint8'}}
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, option in chosen.items():
        fields: dict[str, Any] = {"match": [], "format": option.format}
        key = option.format
        if name in ungroupable:
            key += "_channel"
            fields |= {"granularity": "channel", "transforms": []}
        elif option.format == default:
            continue
        layers.setdefault(key, fields)["match"].append(name)
    return layers
