"""Shards of a stage: several processes share them, and release their locks."""

import fcntl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest

import pipelines.runtime.progress
from fp4dit.store.locks import hold_lock
from fp4dit.store.store import Store
from pipelines.runtime.trainer import Runtime
from pipelines.stages.sharded import ShardedStage, ShardQueue, load_one_by_one
from tests.store.test_locks import hold, refuse


def make_queue(stage: Path, wait_for_others: bool) -> ShardQueue:
    """Return a queue of three shards, whose files are in the draft folder of the stage."""
    folder = stage.with_name("abc.draft") / "units"
    folder.mkdir(parents=True, exist_ok=True)
    return ShardQueue([0, 1, 2], [[folder / f"{i}"] for i in range(3)], stage, "", wait_for_others)


def make_shards(queue: ShardQueue) -> list[int]:
    """Make the shards that the queue yields, and return their numbers in this order."""
    numbers = []
    for number in queue:
        queue.outputs[number][0].write_text("whole")
        numbers.append(number)
    return numbers


def test_helpers_make_free_shards_only(tmp_path: Path):
    queue = make_queue(tmp_path / "abc", wait_for_others=False)
    queue.outputs[0][0].write_text("whole")
    with hold_lock(queue.lock_path(1), ""):
        assert queue.num_available == 1
        assert make_shards(queue) == [2]
        assert queue.num_available == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abc.00001.lock", "abc.draft"]


def test_shards_of_a_dead_helper_are_made(tmp_path: Path):
    queue = make_queue(tmp_path / "abc", wait_for_others=True)
    with hold(queue.lock_path(1)) as other:
        shards = iter(queue)
        assert queue.num_available == 3
        for expected in (0, 2):
            assert next(shards) == expected
            queue.outputs[expected][0].write_text("whole")
        other.kill()
    assert list(shards) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["abc.draft"]  # no locks


def test_a_finished_stage_has_no_missing_shards(tmp_path: Path):
    queue = make_queue(tmp_path / "abc", wait_for_others=False)
    (tmp_path / "abc.draft").rename(tmp_path / "abc")
    assert queue.num_available == 0
    assert make_shards(queue) == []
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
class Stage(ShardedStage):
    broken: int | None = None
    label = "draw"
    folder = "units"

    def list_shards(self, needs: Mapping[str, Path]) -> list[int]:
        return [0, 1, 2]

    def output_paths(self, item: int, folder: Path) -> list[Path]:
        return [folder / f"{item}"]

    def make_task(self, needs: Mapping[str, Path], folder: Path) -> Make:
        return Make(folder, self.broken)

    def finish(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        pass


def test_the_lock_of_a_shard_that_fails_is_released(tmp_path: Path):
    store, runtime = Store(tmp_path), Runtime({"accelerator": "cpu", "devices": 1}, "none")
    with pytest.raises(RuntimeError, match="memory") as error:
        store.get_or_make("generate", "abc", lambda out: Stage(broken=1).run({}, out, runtime), {})
    assert error.value.__traceback__
    result = store.get_or_make("generate", "abc", lambda out: Stage().run({}, out, runtime), {})
    assert sorted(path.name for path in (result / "units").iterdir()) == ["0", "1", "2"]
    assert sorted(path.name for path in result.parent.iterdir()) == ["abc", "abc.lock"]


def test_progress_counts_the_shards_of_others(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipelines.runtime.progress, "SECONDS_BETWEEN_LINES", -1.0)
    queue = make_queue(tmp_path / "abc", wait_for_others=True)
    queue.outputs[1][0].write_text("whole")
    runtime = Runtime({"accelerator": "cpu", "devices": 1}, "lines")
    task = Make(queue.outputs[0][0].parent)
    runtime.make_trainer("draw").predict(task, load_one_by_one(queue), return_predictions=False)
    assert [line.split("  ")[1] for line in capfd.readouterr().out.splitlines()] == ["1/3", "3/3"]
    assert not list(tmp_path.glob("*.lock"))


def test_a_failed_assist_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def fail(draft: Path) -> None:
        raise RuntimeError("out of memory")

    store, out = Store(tmp_path), tmp_path / "capture" / "abc"
    store.try_assist(out, fail)  # there is no draft yet
    assert not caplog.records
    out.with_name("abc.draft").mkdir(parents=True)
    for _ in range(2):
        store.try_assist(out, fail)
    assert [record.message for record in caplog.records] == [
        "could not assist with capture/abc (out of memory); waiting for its job"
    ]


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_shards_are_made_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", refuse)
    store, runtime = Store(tmp_path), Runtime({"accelerator": "cpu", "devices": 1}, "none")
    result = store.get_or_make("generate", "abc", lambda out: Stage().run({}, out, runtime), {})
    assert sorted(path.name for path in (result / "units").iterdir()) == ["0", "1", "2"]
    assert [path.name for path in result.parent.iterdir()] == ["abc"]
