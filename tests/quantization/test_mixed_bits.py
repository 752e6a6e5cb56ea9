"""Bits of layers by sensitivity: against closed forms and against all choices there are."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fp4dit.models.pixart import PixArt
from fp4dit.quantization.audit import audit_weights, effective_bits
from fp4dit.quantization.mixed_bits import (
    FormatOption,
    allocate_formats,
    list_layer_options,
    measure_options,
)
from fp4dit.quantization.rule_specs import weight_rules
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.conftest import Compose

FILE = "shapes_uint_5bits"


class Sum(nn.Module):
    """A module that answers with the sum of two products, as transformers do with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.first(x) + 3 * self.second(x),)


def round_rows(weight: Tensor, codes: int) -> Tensor:
    """Round to nearest with an integer zero point, the formula of min-max INT."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True)
    scale = (high.clamp(min=0) - low) / codes
    zero = (-low / scale).round()
    return ((weight / scale + zero).round().clamp(0, codes) - zero) * scale


def test_errors_are_those_of_the_rounded_layer_alone():
    torch.manual_seed(0)
    model, x = Sum(), torch.randn(4, 5, 16)
    before = [p.clone() for p in model.parameters()]
    rules = [weight_rules(word, "channel", "minmax") for word in ("uint4", "uint8")]
    options = measure_options(model, rules, [Call((x[:2],), {}), Call((x[2:],), {})])
    assert all(map(torch.equal, before, model.parameters()))
    power = model(x)[0].square().sum()
    for name, factor, weight in zip(("first", "second"), (1, 3), before, strict=True):
        for option, bits in zip(options[name], (4, 8), strict=True):
            difference = factor * x @ (round_rows(weight, 2**bits - 1) - weight).T
            assert option.format == f"uint{bits}"
            assert option.bits == bits + (32 + bits) / 16
            expected = (difference.square().sum() / power).item()
            assert option.error == pytest.approx(expected, rel=1e-3)


def make_options(seed: int) -> dict[str, list[FormatOption]]:
    """Return random options of six layers of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    options = {}
    for i in range(6):
        values = int(torch.randint(1, 9, (), generator=generator)) * 64
        errors = torch.rand(3, generator=generator).cumprod(0).tolist()
        if i == 0:
            errors[1] = errors[0]  # bits that do not help
        triples = zip((4.0, 6.0, 8.0), errors, strict=True)
        options[str(i)] = [FormatOption(f"uint{b:g}", values, b, error) for b, error in triples]
    return options


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_within_the_budget_is_much_better(seed: int):
    """All 3^6 choices are tried. At corners of their convex hull the least error is found."""
    options = make_options(seed)
    choices = list(itertools.product(*options.values()))
    values = sum(layer[0].values for layer in options.values())

    def measure(choice: Any) -> tuple[float, float]:
        bits = sum(option.values * option.bits for option in choice) / values
        return bits, sum(option.error for option in choice)

    measured = [measure(choice) for choice in choices]
    largest = max(layer[0].error for layer in options.values())
    for budget in (4.0, 4.7, 5.5, 6.3, 8.0):
        bits, error = measure(allocate_formats(options, budget).values())
        assert bits <= budget + 1e-9
        least = min(e for b, e in measured if b <= budget + 1e-9)
        assert least - 1e-9 <= error <= least + largest
    for bits, error in trace_lower_hull(measured):
        assert measure(allocate_formats(options, bits).values()) == pytest.approx((bits, error))


def trace_lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull, down to the least error (Andrew's algorithm)."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def test_a_budget_below_the_smallest_formats_is_refused():
    with pytest.raises(UserError, match=r"4.5 bits is less than the 5.00 bits"):
        allocate_formats({"a": [FormatOption("uint4", 8, 5.0, 0.1)]}, 4.5)


def test_layers_without_groups_have_a_scale_per_channel():
    chosen = {
        name: FormatOption(word, 8, 4.0, 0.0)
        for name, word in (("a", "uint4"), ("b", "uint8"), ("c", "uint8"), ("d", "uint4"))
    }
    assert list_layer_options(chosen, ungroupable=["d"], default="uint4") == {
        "uint8": {"match": ["b", "c"], "format": "uint8"},
        "uint4_channel": {
            "match": ["d"],
            "format": "uint4",
            "granularity": "channel",
            "transforms": [],
        },
    }


def test_the_file_of_the_shipped_model_keeps_its_budget(composed: Compose):
    """5 bits, with one range for each channel; the first and last layers have the most bits."""
    config = composed("weight=int4_channel_minmax", "rounding=nearest", f"mixed_bits={FILE}")
    node: Any = OmegaConf.to_container(config.weight, resolve=True)
    model = PixArt("pkg://fp4dit/worlds/shapes/weights").build_on_meta().transformer
    audits = audit_weights(model, instantiate(node))
    assert 4.95 < effective_bits(audits) <= 5.0
    most = [audit.name for audit in audits if audit.format == "uint8"]
    assert sorted(most) == ["pos_embed.proj", "proj_out"]
