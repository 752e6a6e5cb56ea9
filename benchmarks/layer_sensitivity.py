"""Give each layer of the shipped model 4, 6 or 8 bits by its sensitivity, within a budget.

Run `python -m benchmarks.layer_sensitivity [BUDGET]`. It measures the error of the transformer's
answers while one layer is rounded, for each layer and format, and prints a file for
`conf/mixed_bits`, whose first lines compare calls of other prompts with formats that all layers
share. The weights are INT with a zero point, one range for each output channel, rounded to nearest.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from benchmarks.cpu import SHIPPED
from fp4dit.data.prompts import get_texts
from fp4dit.models.base import Pipeline
from fp4dit.quantization.mixed_bits import (
    FormatOption,
    allocate_formats,
    list_layer_options,
    measure_options,
    read_answer,
    rounded_to_nearest,
    sum_errors,
)
from fp4dit.quantization.rule_specs import weight_rules
from fp4dit.quantization.rules import Rule, find_layers, match_rules
from fp4dit.utils.calls import Call, record_calls
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions

FORMATS, BUDGET = ("uint4", "uint6", "uint8"), 5.0
PROMPTS, STEPS, GUIDANCE = 4, 3, 4.5
UNGROUPABLE = ["pos_embed.proj"]  # as in conf/model/shapes.yaml


def make_rules(layers: Mapping[str, Mapping] | None = None, word: str = FORMATS[0]) -> list[Rule]:
    """Return the rules of weight=int4_channel_minmax with another format, or with exceptions."""
    return weight_rules(word, "channel", {"rule": "minmax", "dtype": "fp16"}, layers=layers)


def record(pipeline: Pipeline, prompts: Sequence[str], seed: int) -> list[Call]:
    """Return the calls of the transformer while a pipeline draws prompts."""
    with record_calls(pipeline.transformer) as calls:
        pipeline.sample(prompts, range(seed, seed + len(prompts)), STEPS, GUIDANCE)
    return calls


@torch.no_grad()
def measure_call_error(model: nn.Module, rules: Sequence[Rule], calls: Sequence[Call]) -> float:
    """Return the relative squared error of a model's answers with all layers rounded to nearest."""
    answers = [read_answer(call(model)) for call in calls]
    layers = find_layers(model)
    with rounded_to_nearest(layers, match_rules(layers, rules)):
        error = sum_errors(model, calls, answers)
    return error / sum(answer.square().sum().item() for answer in answers)


def print_option(
    chosen: Mapping[str, FormatOption], errors: Mapping[str, float], budget: float
) -> None:
    """Print a file for conf/mixed_bits."""
    values = sum(option.values for option in chosen.values())
    bits = sum(option.values * option.bits for option in chosen.values()) / values
    listed = ", ".join(f"{error:.2g} ({name})" for name, error in errors.items())
    print("# @package weight")
    print(
        f"# 4, 6 or 8 bits for each layer of model=shapes by its sensitivity, {bits:.2f} bits per"
    )
    print("# weight with one range for each channel. For weights of unsigned integers with a zero")
    print(f"# point. Made by `python -m benchmarks.layer_sensitivity {budget:g}`, by which the")
    print(f"# relative squared error of calls to nearest is {listed}.")
    print("per_channel_layers: []\nlayers:")
    for name, fields in list_layer_options(chosen, UNGROUPABLE, FORMATS[0]).items():
        print(f"  mixed_{name}:")
        for key, value in fields.items():
            if key == "match":
                print("    match:\n" + "\n".join(f"      - {layer}" for layer in value))
            else:
                print(f"    {key}: {value}")


def main() -> None:
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else BUDGET
    prompts = get_texts(draw_captions(2 * PROMPTS, ShapesWorld(), held_out=False))
    pipeline = SHIPPED.load()
    calls = record(pipeline, prompts[:PROMPTS], seed=0)
    others = record(pipeline, prompts[PROMPTS:], seed=PROMPTS)
    model = pipeline.transformer
    options = measure_options(model, [make_rules(word=word) for word in FORMATS], calls)
    chosen = allocate_formats(options, budget)
    errors = {
        word: measure_call_error(model, make_rules(word=word), others)
        for word in ("uint4", "uint5", "uint6")
    }
    mixed = make_rules(list_layer_options(chosen))
    errors["mixed"] = measure_call_error(model, mixed, others)
    print_option(chosen, errors, budget)


if __name__ == "__main__":
    main()
