"""Plans are remembered, and made anew as soon as anything they are read from is another."""

import json
from pathlib import Path

import pytest

import pipelines.plans
from fp4dit.errors import UserError
from pipelines.plan import plan
from pipelines.plans import plans
from tests.conftest import Compose

ROWS = [["method=fp4dit"], ["method=fp16"], ["method=rtn", "activation=none"]]


@pytest.fixture
def given(composed: Compose, model: Path) -> list[list[str]]:
    return [[*row, f"model.path={model}", f"metrics.clip.path={model}"] for row in ROWS]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was composed, and not remembered."""
    found, compose = [], pipelines.plans.composed
    listen = lambda overrides, outputs: found.append(overrides) or compose(overrides, outputs)
    monkeypatch.setattr(pipelines.plans, "composed", listen)
    return found


def test_remembered_plans_are_those_that_are_composed(composed: Compose, given, made, tmp_path: Path):
    fresh = [plan(composed(*row)) for row in given]
    for _ in range(2):
        assert [one.steps for one in plans(given, str(tmp_path))] == fresh
    assert made == given
    assert [one.steps for one in plans(given[:1], str(tmp_path))] == fresh[:1]
    assert made == given


def test_another_model_in_the_same_folder_is_planned_anew(given, made, model: Path, tmp_path: Path):
    before = plans(given, str(tmp_path))
    (model / "weights.safetensors").write_bytes(b"other")
    after = plans(given, str(tmp_path))
    assert len(made) == 2 * len(given)
    assert all(a.steps["score"].key != b.steps["score"].key for a, b in zip(before, after, strict=True))


def test_another_config_file_is_planned_anew(given, made, tmp_path: Path):
    folder = tmp_path / "conf"
    folder.mkdir()
    plans(given, str(tmp_path), [f"file://{folder}"])
    (folder / "another.yaml").write_text("a: 1")
    plans(given, str(tmp_path), [f"file://{folder}"])
    assert len(made) == 2 * len(given)
    assert list(json.loads((tmp_path / "store" / ".plans.json").read_text())) == ["read", "plans", "sha256"]


def test_a_file_that_is_not_here_is_told_and_looked_for_again(given, made, model: Path, tmp_path: Path):
    row = [*given[0], f"+prompts.calibration.path={tmp_path}/prompts.txt"]
    for _ in range(2):
        [lacking] = plans([row], str(tmp_path))
        assert "there is no file at" in lacking.problem
        assert lacking.model == str(model)
    assert made == [row]  # remembered, too
    (tmp_path / "prompts.txt").write_text("a red circle")
    assert plans([row], str(tmp_path))[0].steps
    (tmp_path / "prompts.txt").unlink()
    assert plans([row], str(tmp_path))[0].problem
    assert made == 3 * [row]


def test_a_memory_that_cannot_be_read_is_none(given, made, tmp_path: Path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".plans.json").write_text("{")
    assert plans(given, str(tmp_path))[0].steps
    with pytest.raises(UserError, match="folders alone"):
        plans(given, str(tmp_path), ["pkg://somewhere"])
