"""How long a missing row may take, by rows that are there."""

from pathlib import Path

import pytest

from fp4dit.store import Store
from pipelines.missing import Measured, told
from pipelines.plans import Plan, plans
from pipelines.rows import Entry
from tests.conftest import Compose


@pytest.fixture
def entry(composed: Compose, tmp_path: Path):
    return lambda *given: Entry("A", given, plans([list(given)], str(tmp_path))[0])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def finished(entry: Entry, store: Store, seconds: dict[str, float]) -> None:
    for name, second in seconds.items():
        folder = store.path(name, entry.steps[name].key)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(f'{{"seconds": {second}, "files": {{}}}}')


TOOK = {"capture": 10, "reconstruct": 200, "activate": 5, "generate": 30, "reference": 20, "score": 2}


def test_a_stage_takes_as_long_as_its_likes_and_more_if_it_has_more_to_do(entry, store: Store):
    there = entry("method=fp4dit", "calibration=demo")
    finished(there, store, TOOK)
    known = Measured(there.steps.values(), store)

    def expected(*given: str) -> dict[str, float | None]:
        names = {step.key: name for name, step in entry(*given).steps.items()}
        return {names[key]: seconds for key, seconds in known.expected(entry(*given)).items()}

    assert expected("method=fp4dit", "calibration=demo") == {}
    alike = expected("method=fp4dit", "calibration=demo", "activation=e2m3_token")
    assert alike == {name: TOOK[name] for name in ("activate", "generate", "score")}
    longer = expected("method=fp4dit", "calibration=demo", "rounding.steps=400")
    assert longer["reconstruct"] == 2 * TOOK["reconstruct"]
    assert expected("method=fp4dit", "calibration=demo", "prompts.count=16")["generate"] == TOOK["generate"] / 4
    assert expected("method=fp4dit", "calibration.trained=56")["capture"] == 2 * TOOK["capture"]
    assert expected("method=gptq", "calibration=demo")["reconstruct"] is None  # another code rounds


def test_all_missing_rows_together_make_what_they_share_once(entry, store: Store):
    there = entry("method=fp4dit", "calibration=demo")
    finished(there, store, TOOK)
    rows = [
        entry("method=fp4dit", "calibration=demo", "rounding.steps=400", f"activation={a}_token")
        for a in ("e3m4", "e2m3")
    ]
    each, other, everything = (line.split("\n")[0] for line in told(rows, [there], ["table=x"], store))
    assert each == other == "missing: A (about 7 min). To make it:"
    assert everything == "To make them all (about 8 min on one job):"  # 400 s for the weights, 37 s for each row


def test_what_cannot_be_planned_says_why_once(store: Store):
    rows = [Entry(name, [], Plan(problem="there is nothing at 'data/x'")) for name in "AB"]
    lines = list(told(rows, [], ["table=x"], store))
    assert lines[0] == "missing: A (time not estimated). To make it:\n  python -m pipelines.run"
    assert lines.count("before that: there is nothing at 'data/x'") == 1
