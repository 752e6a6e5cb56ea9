"""Which part of a stage is whose, when several processes make them."""

from pathlib import Path

import lightning as L
import pytest

import pipelines.progress
from fp4dit.locks import locked
from fp4dit.store import Store
from pipelines.parted import Parts, one_by_one
from pipelines.runtime import Runtime
from tests.test_locks import hold


def parts(stage: Path, patient: bool) -> Parts:
    folder = stage.with_name("abc.draft") / "units"
    folder.mkdir(parents=True, exist_ok=True)
    return Parts([0, 1, 2], [[folder / f"{i}"] for i in range(3)], stage, "", patient)


def made(given: Parts) -> list[int]:
    """In the order in which they are made."""
    found = []
    for item in given:
        given.made[item][0].write_text("whole")
        found.append(item)
    return found


def test_who_helps_takes_what_nobody_has_taken_or_made(tmp_path: Path):
    given = parts(tmp_path / "abc", patient=False)
    given.made[0][0].write_text("whole")
    with locked(given.lock(1), ""):
        assert given.open == 1
        assert made(given) == [2]
        assert given.open == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.00001.lock", "abc.draft"]


def test_who_runs_the_stage_makes_in_the_end_what_others_had_taken_and_left(tmp_path: Path):
    given = parts(tmp_path / "abc", patient=True)
    with hold(given.lock(1), 60) as other:
        found = iter(given)
        assert given.open == 3
        for expected in (0, 2):
            assert next(found) == expected
            given.made[expected][0].write_text("whole")
        other.kill()
    assert list(found) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["abc.draft"]  # no locks


def test_nothing_is_made_of_a_stage_that_was_finished_meanwhile(tmp_path: Path):
    given = parts(tmp_path / "abc", patient=False)
    (tmp_path / "abc.draft").rename(tmp_path / "abc")
    assert given.open == 0
    assert made(given) == []
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]


class Make(L.LightningModule):
    def __init__(self, given: Parts) -> None:
        super().__init__()
        self.given = given

    def predict_step(self, item: int) -> None:
        self.given.made[item][0].write_text("whole")


def test_progress_counts_what_was_there_and_what_others_make(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.progress, "EVERY", -1.0)
    given = parts(tmp_path / "abc", patient=True)
    given.made[1][0].write_text("whole")
    runtime = Runtime({"accelerator": "cpu", "devices": 1}, "lines")
    runtime.trainer("draw").predict(Make(given), one_by_one(given), return_predictions=False)
    assert [line.split("  ")[1] for line in capfd.readouterr().out.splitlines()] == ["1/3", "3/3"]
    assert not list(tmp_path.glob("*.lock"))


def test_who_cannot_help_says_so_once_and_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def fail(draft: Path) -> None:
        raise RuntimeError("out of memory")

    store, out = Store(tmp_path), tmp_path / "capture" / "abc"
    store.helped(out, fail)  # nothing to help with yet
    assert not caplog.records
    out.with_name("abc.draft").mkdir(parents=True)
    for _ in range(2):
        store.helped(out, fail)
    assert [record.message for record in caplog.records] == [
        "capture/abc is left to who makes it, for helping failed: out of memory"
    ]
