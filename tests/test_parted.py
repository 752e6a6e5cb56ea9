"""Which part of a stage is whose, when several processes make them."""

import fcntl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest

import pipelines.progress
from fp4dit.locks import locked
from fp4dit.store import Store
from pipelines.parted import Parted, Parts, one_by_one
from pipelines.runtime import Runtime
from tests.test_locks import hold, refuse


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
    def __init__(self, folder: Path, broken: int | None = None) -> None:
        super().__init__()
        self.folder, self.broken = folder, broken

    def predict_step(self, item: int) -> None:
        if item == self.broken:
            raise RuntimeError("out of memory")
        (self.folder / f"{item}").write_text("whole")


@dataclass(frozen=True)
class Stage(Parted):
    broken: int | None = None
    label = "draw"
    folder = "units"

    def items(self, needs: Mapping[str, Path]) -> list[int]:
        return [0, 1, 2]

    def files(self, item: int, folder: Path) -> list[Path]:
        return [folder / f"{item}"]

    def task(self, needs: Mapping[str, Path], folder: Path) -> Make:
        return Make(folder, self.broken)

    def finish(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        pass


def test_a_part_that_fails_is_free_for_others_though_its_error_is_kept(tmp_path: Path):
    store, runtime = Store(tmp_path), Runtime({"accelerator": "cpu", "devices": 1}, "none")
    with pytest.raises(RuntimeError, match="memory") as error:
        store.get("generate", "abc", lambda out: Stage(broken=1).run({}, out, runtime), {})
    assert error.value.__traceback__
    made = store.get("generate", "abc", lambda out: Stage().run({}, out, runtime), {})
    assert sorted(path.name for path in (made / "units").iterdir()) == ["0", "1", "2"]
    assert sorted(path.name for path in made.parent.iterdir()) == ["abc", "abc.lock"]


def test_progress_counts_what_was_there_and_what_others_make(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.progress, "EVERY", -1.0)
    given = parts(tmp_path / "abc", patient=True)
    given.made[1][0].write_text("whole")
    runtime = Runtime({"accelerator": "cpu", "devices": 1}, "lines")
    task = Make(given.made[0][0].parent)
    runtime.trainer("draw").predict(task, one_by_one(given), return_predictions=False)
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


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_a_lock_is_a_file_that_exists_parts_are_made_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", refuse)
    store, runtime = Store(tmp_path), Runtime({"accelerator": "cpu", "devices": 1}, "none")
    made = store.get("generate", "abc", lambda out: Stage().run({}, out, runtime), {})
    assert sorted(path.name for path in (made / "units").iterdir()) == ["0", "1", "2"]
    assert [path.name for path in made.parent.iterdir()] == ["abc"]
