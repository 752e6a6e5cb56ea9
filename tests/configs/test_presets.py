"""Every preset and each of its parts fit the shipped model, and no source names a preset."""

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from fp4dit.quantization import apply
from fp4dit.rounding.reconstruction import check_reconstruction
from pipelines.config.resolvers import CONF, list_options
from pipelines.planning.plan import make_plan
from tests.conftest import Compose
from tests.helpers.identities import find_own_paths

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "fp4dit").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
METHODS = list_options("method")
OPTIONS: list[str] = []
PARTS = ("weight", "mixed_bits", "activation", "rounding", "transform")
TESTED_GROUPS = ("method", *PARTS)
for _group in PARTS:
    OPTIONS += [f"{_group}={name}" for name in list_options(_group)]


QUANTIZED_INPUTS = "quantize_inputs_while_rounding=${activation}"


@pytest.fixture(scope="module")
def skeleton() -> nn.Module:
    from fp4dit.models.pixart import PixArt

    return PixArt("pkg://fp4dit/worlds/shapes/weights").build_on_meta().transformer


def check_run(composed: Compose, skeleton: nn.Module, *overrides: str) -> None:
    """Raise what a run would raise before its first stage.

    Every class of ours that a stage's config names must have a tag.
    """
    steps = make_plan(composed(*overrides))
    assert steps["score"]
    for step in steps.values():
        assert find_own_paths(step.identity) == []
    stages = {name: step.instantiate_stage() for name, step in steps.items()}
    if "reconstruct" in stages:
        weights, inputs = stages["reconstruct"], stages["activate"]
        check_reconstruction(
            copy.deepcopy(skeleton), weights.weight, weights.rounding, weights.activation or ()
        )
        apply.check_activations(copy.deepcopy(skeleton), inputs.weight, inputs.activation)
        # Other activation rules would have no static scales, or wrong ones.
        assert weights.activation in (None, inputs.activation)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.unchecked
def test_a_preset_fits_the_shipped_model(composed: Compose, skeleton: nn.Module, method: str):
    check_run(composed, skeleton, f"method={method}")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.unchecked
def test_an_option_fits_the_shipped_model(composed: Compose, skeleton: nn.Module, option: str):
    others = []
    if option.startswith("weight"):
        others.append("rounding=nearest")  # not every format can be learned
    if option.startswith("mixed_bits"):
        others.append("method=q_dit")  # its exceptions are integers with a zero point
    if option.endswith("imatrix"):
        others.append("weight=fp4_channel_min_error")
    if option.endswith("input_steps"):  # of static inputs
        others += ["activation=int8_tensor_static_minmax", QUANTIZED_INPUTS]
    check_run(composed, skeleton, option, *others)


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_only_chooses_among_groups_and_says_what_it_is(method: str):
    """Its second line is a comment that describes it. Sentences of `differs` are not counted."""
    text, _, _ = (CONF / "method" / f"{method}.yaml").read_text().partition("\ndiffers:\n")
    lines = text.splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert len(lines) <= 13


# The package, a number format, and a rounding that several presets share.
OTHERWISE_NAMED = {"fp4dit", "fp16", "gptq"}


def iter_words(path: Path) -> Iterator[str]:
    """Yield the words of identifiers and of string literals without spaces.

    Docstrings may name the source of a method, and messages may name a preset as an example: no
    code compares a preset's name with a text that has spaces.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for name in ("id", "attr", "name", "arg", "asname", "value"):
            text = getattr(node, name, None)
            if isinstance(text, str) and " " not in text:
                yield from re.findall(r"\w+", text)


def find_presets(path: Path) -> set[str]:
    """Return the presets that a source names."""
    return {word.lower() for word in iter_words(path)} & set(METHODS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_names_a_preset(path: Path):
    assert find_presets(path) <= OTHERWISE_NAMED


def test_the_search_for_names_finds_them(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""See HQ_DiT."""\n'
        'def msfp(x, rtn):\n    "See Q_DiT"\n    return x.afpq or "method/gptq"\n'
    )
    assert find_presets(path) == {"msfp", "rtn", "afpq", "gptq"}
