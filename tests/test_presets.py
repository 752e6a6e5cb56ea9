"""Every preset and every part it may be put together from fits the shipped model; and no source names a preset."""

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from fp4dit import policy
from fp4dit.reconstruction import check
from pipelines.plan import plan
from pipelines.resolvers import CONF, options
from tests.conftest import Compose

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "fp4dit").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
METHODS = options("method")
OPTIONS = [f"{group}={name}" for group in ("weight", "activation", "rounding", "transform") for name in options(group)]


@pytest.fixture(scope="module")
def skeleton() -> nn.Module:
    from fp4dit.models.pixart import PixArt

    return PixArt("pkg://fp4dit.models.shapes/weights").skeleton().dit


def fits(composed: Compose, skeleton: nn.Module, *overrides: str) -> None:
    """Raises what a run would raise before its first stage."""
    steps = plan(composed(*overrides))
    stages = {name: step.make() for name, step in steps.items()}
    if "reconstruct" in stages:
        weights, inputs = stages["reconstruct"], stages["activate"]
        check(copy.deepcopy(skeleton), weights.weight, weights.rounding, weights.activation or ())
        policy.check_activations(copy.deepcopy(skeleton), inputs.weight, inputs.activation)
        assert weights.activation in (None, inputs.activation)  # others would find no scales, or the wrong ones


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.unchecked
def test_a_preset_fits_the_shipped_model(composed: Compose, skeleton: nn.Module, method: str):
    fits(composed, skeleton, f"method={method}")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_fits_the_shipped_model(composed: Compose, skeleton: nn.Module, option: str):
    plain = ["rounding=nearest"] if option.startswith("weight") else []  # not every format can be learnt in
    plain += ["weight=fp4_searched"] if option.endswith("weighed") else []
    fits(composed, skeleton, option, *plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_only_chooses_among_groups_and_says_what_it_is(method: str):
    lines = (CONF / "method" / f"{method}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert len(lines) <= 12


# The package, a number format, and a rounding that several presets share.
OTHERWISE_NAMED = {"fp4dit", "fp16", "gptq"}


def words(path: Path) -> Iterator[str]:
    """Identifiers and string literals, docstrings left out: those name sources."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = None
    for node in ast.walk(tree):
        given = [getattr(node, name, None) for name in ("id", "attr", "name", "arg", "asname", "value")]
        yield from (word for text in given if isinstance(text, str) for word in re.findall(r"\w+", text))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_names_a_preset(path: Path):
    assert {word.lower() for word in words(path)} & set(METHODS) <= OTHERWISE_NAMED


def test_the_search_for_names_finds_them(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text('"""HQ_DiT"""\ndef msfp(x, rtn):\n    """Q_DiT"""\n    return x.afpq or "use gptq here"\n')
    assert {word.lower() for word in words(path)} & set(METHODS) == {"msfp", "rtn", "afpq", "gptq"}
