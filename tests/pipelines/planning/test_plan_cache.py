"""Plans are cached, and composed again when a config, code or a file of theirs has changed."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import pipelines.planning.plan_cache
from fp4dit.registry import tags_by_path
from fp4dit.store.manifest import compute_key
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import file_sha256
from fp4dit.utils.hub import find_weights
from pipelines.config.resolvers import hash_content
from pipelines.config.validation import check_numbers_finite
from pipelines.planning.plan import make_plan
from pipelines.planning.plan_cache import hash_sources, plan_runs
from pipelines.planning.stage_kinds import make_identity
from tests.conftest import Compose

ROWS = [["method=fp4dit"], ["method=fp16"], ["method=rtn", "activation=none"]]


@pytest.fixture
def runs(composed: Compose, model: Path) -> list[list[str]]:
    return [[*row, f"model.path={model}", f"metrics.clip.path={model}"] for row in ROWS]


@pytest.fixture
def composed_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of the runs that are composed, because their plans are not cached."""
    calls, compose_plan = [], pipelines.planning.plan_cache.compose_plan

    def record_and_compose(overrides, outputs):
        calls.append(overrides)
        return compose_plan(overrides, outputs)

    monkeypatch.setattr(pipelines.planning.plan_cache, "compose_plan", record_and_compose)
    return calls


def test_cached_plans_equal_composed_ones(composed: Compose, runs, composed_runs, tmp_path: Path):
    expected = [make_plan(composed(*run)) for run in runs]
    for _ in range(2):
        assert [plan.stages for plan in plan_runs(runs, str(tmp_path))] == expected
    assert composed_runs == runs
    assert [plan.stages for plan in plan_runs(runs[:1], str(tmp_path))] == expected[:1]
    assert composed_runs == runs


def test_changed_weights_are_planned_again(runs, composed_runs, model: Path, tmp_path: Path):
    before = plan_runs(runs, str(tmp_path))
    (model / "weights.safetensors").write_bytes(b"other")
    after = plan_runs(runs, str(tmp_path))
    assert len(composed_runs) == 2 * len(runs)
    for old, new in zip(before, after, strict=True):
        assert old.stages["score"].key != new.stages["score"].key


def test_another_config_file_is_planned_again(runs, composed_runs, tmp_path: Path):
    folder = tmp_path / "conf"
    folder.mkdir()
    plan_runs(runs, str(tmp_path), [f"file://{folder}"])
    (folder / "another.yaml").write_text("a: 1")
    plan_runs(runs, str(tmp_path), [f"file://{folder}"])
    assert len(composed_runs) == 2 * len(runs)
    cache = json.loads((tmp_path / "store" / ".plans.json").read_text())
    assert list(cache) == ["read", "plans", "sha256"]


def test_a_change_of_the_code_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The hash depends on each module that computes stages, tags, keys or answers."""
    functions = (make_plan, make_identity, tags_by_path, compute_key, check_numbers_finite)
    functions = (*functions, hash_content, find_weights, file_sha256, plan_runs)
    files = {str(sys.modules[function.__module__].__file__) for function in functions}
    before = hash_sources([tmp_path])
    read_bytes = Path.read_bytes
    for file in files:
        change = partial(_read_changed, read_bytes, file)
        monkeypatch.setattr(Path, "read_bytes", lambda path, change=change: change(path))
        assert hash_sources([tmp_path]) != before, file
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert hash_sources([tmp_path]) == before


def _read_changed(read_bytes: Callable[[Path], bytes], changed: str, path: Path) -> bytes:
    """Read a file as it would be after a line was added to the file `changed`."""
    content = read_bytes(path)
    return content + b"\n# changed" if str(path) == changed else content


def test_a_missing_file_is_reported_until_it_exists(
    runs, composed_runs, model: Path, tmp_path: Path
):
    run = [*runs[0], f"+prompts.calibration.path={tmp_path}/prompts.txt"]
    for _ in range(2):
        [plan] = plan_runs([run], str(tmp_path))
        assert "there is no file at" in plan.problem
        assert plan.model == str(model)
    assert composed_runs == [run]  # the problem is cached, too
    (tmp_path / "prompts.txt").write_text("a red circle")
    assert plan_runs([run], str(tmp_path))[0].stages
    (tmp_path / "prompts.txt").unlink()
    assert plan_runs([run], str(tmp_path))[0].problem
    assert composed_runs == 3 * [run]


def test_an_unreadable_cache_is_ignored(runs, composed_runs, tmp_path: Path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".plans.json").write_text("{")
    assert plan_runs(runs, str(tmp_path))[0].stages
    with pytest.raises(UserError, match="from folders only"):
        plan_runs(runs, str(tmp_path), ["pkg://somewhere"])
