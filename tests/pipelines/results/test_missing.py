"""Time estimates of missing rows from the rows in the store."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fp4dit.store.store import Store
from pipelines.planning.plan_cache import RunPlan, plan_runs
from pipelines.results.missing import MeasuredTimes, describe_missing
from pipelines.results.rows import PlannedRun
from tests.conftest import Compose


@pytest.fixture
def entry(composed: Compose, tmp_path: Path):
    def plan(*overrides: str) -> PlannedRun:
        return PlannedRun("A", overrides, plan_runs([list(overrides)], str(tmp_path))[0])

    return plan


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def add_results(run: PlannedRun, store: Store, seconds: Mapping[str, float]) -> None:
    """Add an entry without files for each stage, which took so many seconds."""
    for name, duration in seconds.items():
        folder = store.get_path(name, run.stages[name].key)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(f'{{"seconds": {duration}, "files": {{}}}}')


SECONDS = {
    "capture": 10,
    "reconstruct": 200,
    "activate": 5,
    "generate": 30,
    "reference": 20,
    "score": 2,
}


def test_times_are_estimated_from_comparable_stages(entry, store: Store):
    """A stage takes as long as comparable ones, in proportion to its work."""
    stored = entry("method=fp4dit", "calibration=demo")
    add_results(stored, store, SECONDS)
    known = MeasuredTimes(stored.stages.values(), store)

    def expected(*overrides: str) -> dict[str, float | None]:
        run = entry(*overrides)
        names = {stage.key: name for name, stage in run.stages.items()}
        return {names[key]: seconds for key, seconds in known.estimate_run(run).items()}

    assert expected("method=fp4dit", "calibration=demo") == {}
    alike = expected("method=fp4dit", "calibration=demo", "activation=e2m3_token")
    assert alike == {name: SECONDS[name] for name in ("activate", "generate", "score")}
    longer = expected("method=fp4dit", "calibration=demo", "rounding.steps=400")
    assert longer["reconstruct"] == 2 * SECONDS["reconstruct"]
    assert (
        expected("method=fp4dit", "calibration=demo", "prompts.count=16")["generate"]
        == SECONDS["generate"] / 4
    )
    assert (
        expected("method=fp4dit", "calibration.num_prompts=56")["capture"] == 2 * SECONDS["capture"]
    )
    assert expected("method=gptq", "calibration=demo")["reconstruct"] is None  # another code rounds


def test_missing_rows_make_shared_stages_once(entry, store: Store):
    stored = entry("method=fp4dit", "calibration=demo")
    add_results(stored, store, SECONDS)
    rows = [
        entry("method=fp4dit", "calibration=demo", "rounding.steps=400", f"activation={a}_token")
        for a in ("e3m4", "e2m3")
    ]
    each, other, everything = (
        line.split("\n")[0] for line in describe_missing(rows, [stored], ["table=x"], store)
    )
    assert each == other == "missing: A (about 7 min). To make it:"
    assert (
        everything == "To make them all (about 8 min on one job):"
    )  # 400 s for the weights, 37 s for each row


def test_the_problem_of_several_runs_is_printed_once(store: Store):
    rows = [PlannedRun(name, [], RunPlan(problem="there is nothing at 'data/x'")) for name in "AB"]
    lines = list(describe_missing(rows, [], ["table=x"], store))
    assert lines[0] == "missing: A (time not estimated). To make it:\n  python -m pipelines.run"
    assert lines.count("before that: there is nothing at 'data/x'") == 1
