"""Full disks, folders without write permission, and damaged files."""

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

from fp4dit.calibration import captured_calls
from fp4dit.data.columns import DiskTensor
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.store.entries import list_entries
from fp4dit.store.store import Store
from fp4dit.utils import pytree_io
from fp4dit.utils.safetensors_io import save_tensors
from pipelines.cli.errors import explain_error
from pipelines.planning.executor import execute_plan, list_pending_stages
from pipelines.planning.plan import make_plan
from pipelines.planning.plan_cache import plan_runs
from pipelines.runtime.trainer import Runtime
from tests.conftest import ROOT, TOY
from tests.faults.conftest import DRILL, LONG, Plan, fork_job, start_job
from tests.faults.drill import check, results
from tests.helpers.small_runs import SMALL
from tests.helpers.waiting import PATIENCE, wait_until

Mount = Callable[[str, str], Path]
Hold = Callable[[str], Path]
QUIET = Runtime(progress="none")


@pytest.mark.parametrize("room", [0, 60, 300, *([200, 350, 400] if LONG else [])])
def test_a_full_disk_is_reported_and_loses_nothing_finished(
    tmpfs: Mount, steps: Plan, tmp_path: Path, room: int
):
    """The disk has `room` kilobytes for 480."""
    planned, place = steps(), tmpfs("small", f"size={room + 4}k")
    if room:
        with pytest.raises(OSError, match="No space left"):
            execute_plan(planned, ["score"], Store(place / "store"), QUIET)
        known = check(place / "store", {})
    else:
        (place / "full").write_bytes(bytes(4096))
        process, known = start_job(place), {}
        error = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 1
        assert error.count("error: the disk is full") == 1
        assert "Traceback" not in error
    tmpfs("small", "remount,size=8m")
    execute_plan(planned, ["score"], Store(place / "store"), QUIET)
    check(place / "store", known)
    execute_plan(planned, ["score"], Store(tmp_path / "store"), QUIET)
    assert results(place / "store") == results(tmp_path / "store")


def test_all_tensor_writers_report_a_full_disk(tmpfs: Mount, pipeline: PixArtAdapter):
    place, rows = tmpfs("small", "size=64k"), torch.zeros(1 << 16)
    writers: list[Callable[[], None]] = [
        lambda: captured_calls.save_calls([[{"x": rows}]], place / "calls.safetensors"),
        lambda: save_tensors({"x": rows}, place / "x.safetensors"),
        lambda: pytree_io.save_tree({"x": rows}, place / "tree.safetensors"),
        lambda: DiskTensor(place, rows.shape, rows.dtype).write(0, rows),
        lambda: pipeline.save(place / "pipeline", "tiny"),
    ]
    for write in writers:
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert (explain_error(error.value) or "").startswith("the disk is full")
    assert list(place.glob("*.safetensors")) == []


def check_permission_error(process: subprocess.Popen, folder: Path) -> None:
    """Check that a job fails with one message that names the folder."""
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1, error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert str(folder) in error
    assert "outputs=" in error


def test_read_only_stores_can_be_inspected_and_runs_fail(tmpfs: Mount, steps: Plan):
    place = tmpfs("shared", "size=8m")
    planned = steps()
    execute_plan(planned, ["score"], Store(place / "store"), QUIET)
    (place / "store" / "score" / f"{'0' * 16}.draft").mkdir()
    tmpfs("shared", "remount,ro")
    assert list_pending_stages(planned, ["score"], Store(place / "store")) == []
    check_permission_error(start_job(place), place)
    commands = [
        ["store", "ls", DRILL[1]],
        ["store", "verify", DRILL[1]],
        ["run", "dry_run=true", *DRILL],
    ]
    for words in commands if LONG else commands[:1]:
        command = [sys.executable, "-m", f"pipelines.{words[0]}", *words[1:], f"outputs={place}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give up rights")
@pytest.mark.parametrize(
    ("place", "mode"),
    [("", 0o555), ("store/reconstruct", 0o555), ("store/capture/*/manifest.json", 0)],
)
def test_a_missing_permission_is_reported(steps: Plan, tmp_path: Path, place: str, mode: int):
    """The process may not overrule file modes. An unreadable file does not count as damaged."""
    (tmp_path / "outputs").mkdir()
    if place:
        execute_plan(steps(), ["capture"], Store(tmp_path / "outputs" / "store"), QUIET)
        (tmp_path / "outputs" / "store" / "reconstruct").mkdir()
    before = results(tmp_path / "outputs" / "store")
    [closed] = (tmp_path / "outputs").glob(place) if place else [tmp_path / "outputs"]
    closed.chmod(mode)
    unprivileged = [
        "setpriv",
        "--bounding-set=-dac_override,-dac_read_search",
        "--inh-caps=-dac_override,-dac_read_search",
    ]
    if subprocess.run([*unprivileged, "true"]).returncode:
        pytest.skip("setpriv cannot give up rights here")
    command = [
        *unprivileged,
        sys.executable,
        "-m",
        "pipelines.run",
        *DRILL,
        f"outputs={tmp_path / 'outputs'}",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    check_permission_error(subprocess.Popen(command, cwd=ROOT, text=True, **pipes), closed)
    closed.chmod(0o755)
    assert results(tmp_path / "outputs" / "store") == before


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    """Return the data with one bit flipped."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Return a beginning of the data."""
    return data[: rng.randrange(len(data))]


def damage_each_kind(root: Path, remake: Callable[[], None], damage: Callable, rounds: int) -> None:
    """Damage a file of each kind in turn, and check that it is detected and made again."""
    remake()
    expected, rng = results(root), random.Random(1)
    examples = {}  # one file of each stage and name, up to digits in the name
    for entry in list_entries(root):
        for path in sorted(entry.path.rglob("*")):
            name = str(path.relative_to(entry.path))
            if path.is_file():
                examples[entry.stage, re.sub(r"\d+", "", name)] = (entry, path)
    for one, path in [*examples.values()] * rounds:
        path.write_bytes(damage(path.read_bytes(), rng))
        name = str(path.relative_to(one.path))
        damaged = Store(root).find_damaged_files(one.path)
        # A flipped bit of a blank, or of the checksum's name, does not damage a manifest.
        if damaged or name != "manifest.json":
            assert damaged == [name]
            remake()
        remade = results(root)
        different = {name for name in expected if remade[name] != expected[name]}
        assert {name for name in different if not name.startswith("score/")} == set()
        check(root, {})


@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_every_kind_of_file_is_made_again(composed, tmp_path: Path, damage: Callable):
    for stages in (TOY, DRILL):
        planned = make_plan(composed(*stages))
        root = tmp_path / stages[0] / "store"
        make = lambda planned=planned, root=root: run_all_stages(planned, root)
        damage_each_kind(root, make, damage, 5 if LONG else 1)


def run_all_stages(planned, root: Path) -> None:
    """Run all stages, also those that an existing score does not need."""
    execute_plan(planned, [name for name in planned if name != "export"], Store(root), QUIET)


@pytest.mark.skipif(not LONG, reason="takes minutes: make drills")
@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_every_kind_of_file_of_the_real_thing_is_made_again(
    composed, tmp_path: Path, damage: Callable
):
    planned, root = make_plan(composed(*SMALL)), tmp_path / "store"
    damage_each_kind(root, lambda: run_all_stages(planned, root), damage, 1)


@pytest.mark.parametrize("stages", [[], ["stages=shared"]])
@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_a_damaged_unit_of_a_killed_job_is_made_again(
    steps: Plan, tmp_path: Path, hold: Hold, damage: Callable, stages: list[str]
):
    planned, root = steps(*stages), tmp_path / "store"
    execute_plan(planned, ["score"], Store(tmp_path / "undisturbed"), QUIET)
    held = hold("reconstruct/1")
    pid = fork_job(planned, root)
    unit = wait_until(lambda: next(iter(root.glob("reconstruct/*.draft/units/000.bin")), None))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    held.unlink()
    unit.write_bytes(damage(unit.read_bytes(), random.Random(3)))
    execute_plan(planned, ["score"], Store(root), QUIET)
    check(root, {})
    assert results(root) == results(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", [".checksums.json", ".plans.json"])
def test_a_flipped_bit_in_a_cache_changes_no_key(composed, tmp_path: Path, name: str):
    """A cached checksum of the model is an example."""
    overrides = [["method=rtn", "metrics=paired"]]
    keys = lambda: {
        step.name: step.key for step in plan_runs(overrides, str(tmp_path))[0].stages.values()
    }
    expected, file, rng = keys(), tmp_path / "store" / name, random.Random(2)
    intact = file.read_bytes()
    for _ in range(200 if LONG else 4):
        file.write_bytes(flip_bit(intact, rng))
        if name == ".checksums.json":
            (tmp_path / "store" / ".plans.json").unlink(missing_ok=True)
        assert keys() == expected


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_setting_the_clock_does_not_change_durations(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int
):
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now.__setitem__(0, now[0] + jump) or now[0])
    planned, store = steps(), Store(tmp_path / "store")
    execute_plan(planned, ["score"], store, QUIET)
    assert all(
        0 <= (store.read_seconds(one.stage, one.key) or 0) < 1800
        for one in list_entries(store.root)
    )
    assert list_pending_stages(planned, ["score"], Store(tmp_path / "store")) == []
