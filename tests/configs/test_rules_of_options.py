"""Rules of every option of conf/weight and conf/activation against an explicit enumeration."""

from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import NumberFormat
from fp4dit.quantization.rules import Rule
from pipelines.config.resolvers import list_options
from tests.conftest import Compose

EXPECTED = yaml.safe_load((Path(__file__).parent / "expected_rules.yaml").read_text())
PAIRS = list(zip_longest(*(list_options(group) for group in EXPECTED)))


def describe_rule(rule: Rule) -> str:
    """Return what a rule means in one line: pattern, format, granularity, scale, and the rest."""
    quantizer = rule.quantizer
    assert quantizer is not None
    selection = quantizer.format
    words = [rule.match, selection.name]
    if isinstance(selection, FormatSelection):
        words.append(f"by {describe_object(selection.by)} per {selection.per}")
    words += [describe_object(quantizer.granularity), describe_object(quantizer.scale)]
    words += map(describe_object, rule.transforms)
    if rule.observer:
        words.append(f"static {describe_object(rule.observer)}")
    for name in ("per_timestep", "before_norm", "optional"):
        if getattr(rule, name):
            words.append(name)
    return " ".join(words)


def describe_object(value: Any) -> str:
    """Return a class and the fields that differ from their defaults."""
    if isinstance(value, NumberFormat):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe_object(item) for item in value)}]"
    if not hasattr(value, "__dataclass_fields__"):
        return getattr(value, "__name__", str(value))
    options = []
    for f in fields(value):
        option = getattr(value, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if option != default:
            options.append(f"{f.name}={describe_object(option)}")
    return f"{type(value).__name__}({', '.join(options)})"


@pytest.mark.parametrize("names", PAIRS, ids=str)
def test_options_make_the_rules_that_they_are_to(composed: Compose, names: tuple[str | None, ...]):
    """An option of weights and one of activations are composed together, which is faster."""
    chosen = {group: name for group, name in zip(EXPECTED, names, strict=True) if name}
    overrides = [f"{group}={name}" for group, name in chosen.items()]
    config = composed(*overrides, "model=pixart_alpha", "model_layers.sensitive=[]")
    for group, name in chosen.items():
        rules = instantiate(OmegaConf.to_container(config[group], resolve=True), _convert_="all")
        assert [describe_rule(rule) for rule in rules] == EXPECTED[group][name]


def test_every_expectation_has_an_option():
    for group, options in EXPECTED.items():
        assert sorted(options) == sorted(list_options(group))


def test_a_model_says_which_layers_are_special(composed: Compose):
    """The small model has heads of 32, which groups divide; HunyuanDiT has long skips."""
    config = composed("activation=nvfp4", "weight=nvfp4", "model=shapes")
    rules = instantiate(OmegaConf.to_container(config.activation, resolve=True), _convert_="all")
    assert [rule.match for rule in rules] == ["*"]
    config = composed("weight=fp4dit", "activation=e3m4_token_halves", "model=hunyuan")
    rules = instantiate(OmegaConf.to_container(config.weight, resolve=True), _convert_="all")
    assert [rule.match for rule in rules] == ["*.ff.net.0.proj", "blocks.*"]
    rules = instantiate(OmegaConf.to_container(config.activation, resolve=True), _convert_="all")
    assert describe_rule(rules[0]) == "*.skip_linear e3m4 PerSplit(parts=2) AbsMax() optional"
    assert [rule.match for rule in rules[1:]] == ["*"]
