"""Disks that are full, folders that may not be written to, files that are not what they were."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp4dit import calls, tree
from fp4dit.columns import OnDisk
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.store import Store
from fp4dit.stored import contents
from fp4dit.tensors import save_tensors
from pipelines.command import explain
from pipelines.plan import execute, pending, plan
from pipelines.plans import plans
from pipelines.runtime import Runtime
from tests.conftest import ROOT, TOY, until
from tests.faults.conftest import DRILL, LONG, Plan, forked, job
from tests.faults.drill import check, results
from tests.test_end_to_end import SMALL

Mount = Callable[[str, str], Path]
QUIET = Runtime(progress="none")


@pytest.mark.parametrize("room", [0, 60, 300, *([200, 350, 400] if LONG else [])])
def test_a_full_disk_is_said_and_costs_nothing_finished(tmpfs: Mount, steps: Plan, tmp_path: Path, room: int):
    """With so many kilobytes for 480."""
    planned, place = steps(), tmpfs("small", f"size={room + 4}k")
    if room:
        with pytest.raises(OSError, match="No space left"):
            execute(planned, ["score"], Store(place / "store"), QUIET)
        known = check(place / "store", {})
    else:
        (place / "full").write_bytes(bytes(4096))
        process, known = job(place), {}
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert error.count("error: the disk is full") == 1
        assert "Traceback" not in error
    tmpfs("small", "remount,size=8m")
    execute(planned, ["score"], Store(place / "store"), QUIET)
    check(place / "store", known)
    execute(planned, ["score"], Store(tmp_path / "store"), QUIET)
    assert results(place / "store") == results(tmp_path / "store")


def test_whatever_writes_tensors_says_that_the_disk_is_full(tmpfs: Mount, pipeline: PixArtPipeline):
    place, rows = tmpfs("small", "size=64k"), torch.zeros(1 << 16)
    writers: list[Callable[[], None]] = [
        lambda: calls.save([{"x": rows}], place / "calls.safetensors"),
        lambda: save_tensors({"x": rows}, place / "x.safetensors"),
        lambda: tree.save({"x": rows}, place / "tree.safetensors"),
        lambda: OnDisk(place, rows.shape, rows.dtype).write(0, rows),
        lambda: pipeline.save(place / "pipeline", "tiny"),
    ]
    for write in writers:
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert (explain(error.value) or "").startswith("the disk is full")
    assert list(place.glob("*.safetensors")) == []


def denied(process: subprocess.Popen, folder: Path) -> None:
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1, error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert str(folder) in error
    assert "outputs=" in error


def test_what_may_only_be_read_can_be_looked_at_and_a_run_says_so(tmpfs: Mount, steps: Plan):
    place = tmpfs("shared", "size=8m")
    planned = steps()
    execute(planned, ["score"], Store(place / "store"), QUIET)
    (place / "store" / "score" / f"{'0' * 16}.draft").mkdir()
    tmpfs("shared", "remount,ro")
    assert pending(planned, ["score"], Store(place / "store")) == []
    denied(job(place), place)
    commands = [["store", "ls", DRILL[1]], ["store", "verify", DRILL[1]], ["run", "dry_run=true", *DRILL]]
    for words in commands if LONG else commands[:1]:
        command = [sys.executable, "-m", f"pipelines.{words[0]}", *words[1:], f"outputs={place}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("place", "mode"), [("", 0o555), ("store/reconstruct", 0o555), ("store/capture/*/manifest.json", 0)]
)
def test_who_has_no_right_to_write_or_read_is_told(steps: Plan, tmp_path: Path, place: str, mode: int):
    """In a process that has root's files to read, and not the right to overrule their modes. What cannot be read is
    not taken for damaged."""
    (tmp_path / "outputs").mkdir()
    if place:
        execute(steps(), ["capture"], Store(tmp_path / "outputs" / "store"), QUIET)
        (tmp_path / "outputs" / "store" / "reconstruct").mkdir()
    before = results(tmp_path / "outputs" / "store")
    [closed] = (tmp_path / "outputs").glob(place) if place else [tmp_path / "outputs"]
    closed.chmod(mode)
    bare = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if subprocess.run([*bare, "true"]).returncode:
        pytest.skip("setpriv cannot give up rights here")
    command = [*bare, sys.executable, "-m", "pipelines.run", *DRILL, f"outputs={tmp_path / 'outputs'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    denied(subprocess.Popen(command, cwd=ROOT, text=True, **pipes), closed)
    closed.chmod(0o755)
    assert results(tmp_path / "outputs" / "store") == before


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def harmed(root: Path, remake: Callable[[], None], harm: Callable, rounds: int) -> None:
    """One file after another is harmed: every time that is seen, and what is made then has the bytes it had."""
    remake()
    expected, rng = results(root), random.Random(1)
    files = [(one, path) for one in contents(root) for path in sorted(one.path.rglob("*")) if path.is_file()]
    kind = lambda one, path: (one.stage, re.sub(r"\d+", "", str(path.relative_to(one.path))))
    chosen = {kind(one, path): (one, path) for one, path in files}
    for one, path in [*chosen.values()] * rounds:
        path.write_bytes(harm(path.read_bytes(), rng))
        name = str(path.relative_to(one.path))
        damaged = Store(root).damaged(one.path)
        if damaged or name != "manifest.json":  # where blanks, and the name of its checksum, say nothing
            assert damaged == [name]
            remake()
        found = results(root)
        different = {name for name in expected if found[name] != expected[name]}
        assert {name for name in different if not name.startswith("score/")} == set()
        check(root, {})


@pytest.mark.parametrize("harm", [flipped, truncated])
def test_every_kind_of_file_that_is_harmed_is_made_again(composed, tmp_path: Path, harm: Callable):
    for stages in (TOY, DRILL):
        planned = plan(composed(*stages))
        root = tmp_path / stages[0] / "store"
        make = lambda planned=planned, root=root: everything(planned, root)
        harmed(root, make, harm, 5 if LONG else 1)


def everything(planned, root: Path) -> None:
    """Also what the score, which is there, would not need."""
    execute(planned, [name for name in planned if name != "export"], Store(root), QUIET)


@pytest.mark.skipif(not LONG, reason="takes minutes: make drills")
@pytest.mark.parametrize("harm", [flipped, truncated])
def test_every_kind_of_file_of_the_real_thing_is_made_again(composed, tmp_path: Path, harm: Callable):
    planned, root = plan(composed(*SMALL)), tmp_path / "store"
    harmed(root, lambda: everything(planned, root), harm, 1)


@pytest.mark.parametrize("stages", [[], ["stages=shared"]])
@pytest.mark.parametrize("harm", [flipped, truncated])
def test_a_finished_unit_of_a_killed_job_that_is_harmed_is_made_again(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable, stages: list[str]
):
    planned, root = steps(*stages), tmp_path / "store"
    execute(planned, ["score"], Store(tmp_path / "undisturbed"), QUIET)
    monkeypatch.setenv("DRILL_SECONDS", "0.3")
    pid = forked(planned, root)
    unit = until(lambda: next(iter(root.glob("reconstruct/*.draft/units/000.bin")), None))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    monkeypatch.delenv("DRILL_SECONDS")
    unit.write_bytes(harm(unit.read_bytes(), random.Random(3)))
    execute(planned, ["score"], Store(root), QUIET)
    check(root, {})
    assert results(root) == results(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", [".checksums.json", ".plans.json"])
def test_a_flipped_bit_in_what_is_remembered_changes_no_identity(composed, tmp_path: Path, name: str):
    """Such as a checksum of the model, which would be another one."""
    given = [["method=rtn", "metrics=paired"]]
    keys = lambda: {step.name: step.key for step in plans(given, str(tmp_path))[0].steps.values()}
    expected, file, rng = keys(), tmp_path / "store" / name, random.Random(2)
    intact = file.read_bytes()
    for _ in range(200 if LONG else 4):
        file.write_bytes(flipped(intact, rng))
        if name == ".checksums.json":
            (tmp_path / "store" / ".plans.json").unlink(missing_ok=True)
        assert keys() == expected


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_is_set_takes_and_gives_no_time(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int
):
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now.__setitem__(0, now[0] + jump) or now[0])
    planned, store = steps(), Store(tmp_path / "store")
    execute(planned, ["score"], store, QUIET)
    assert all(0 <= (store.seconds(one.stage, one.key) or 0) < 10 for one in contents(store.root))
    assert pending(planned, ["score"], Store(tmp_path / "store")) == []
