"""Kills and interrupts of processes, and processes that make the same results."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4dit.store.draft import lock_path
from fp4dit.store.locks import read_holder
from fp4dit.store.store import Store
from pipelines.planning.executor import execute_plan
from pipelines.runtime.trainer import Runtime
from tests.faults.conftest import LONG, Plan, fork_job, has_ended, start_job
from tests.faults.drill import check, count_files, results
from tests.helpers.small_runs import SMALL
from tests.helpers.waiting import PATIENCE, wait_until

Hold = Callable[[str], Path]


def run_undisturbed(steps, root: Path) -> dict[str, bytes]:
    """Run a plan without interruptions, and return its results."""
    execute_plan(steps, ["score"], Store(root), Runtime(progress="none"))
    return results(root)


def test_kills_at_random_moments_lose_nothing_finished(steps: Plan, tmp_path: Path):
    """Jobs run one after another on a store, which is emptied whenever a job completes."""
    planned, root, rng = steps(), tmp_path / "store", random.Random(0)
    expected = run_undisturbed(planned, tmp_path / "undisturbed")
    kills, whole_runs, known = 0, 0, {}
    while kills < (400 if LONG else 25) or whole_runs < 2:
        pid = fork_job(planned, root)
        number = count_files(root) + rng.randint(0, 10)
        wait_until(lambda pid=pid, n=number: count_files(root) >= n or has_ended(pid))
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        known = check(root, known)
        kills += code == signal.SIGKILL
        if code == 0:
            assert results(root) == expected
            shutil.rmtree(root)
            known, whole_runs = {}, whole_runs + 1
    assert run_undisturbed(planned, root) == expected
    check(root, known)
    assert not list(root.glob("*/*.draft*"))


@pytest.mark.skipif(not LONG, reason="takes minutes: make drills")
def test_kills_of_the_real_thing_lose_nothing_finished(tmp_path: Path):
    small = [*SMALL, "prompts.count=1"]
    assert start_job(tmp_path / "undisturbed", stages=small).wait() == 0
    expected, rng, known, root = (
        results(tmp_path / "undisturbed" / "store"),
        random.Random(0),
        {},
        tmp_path / "store",
    )
    changed = lambda: [
        n for n, made in results(root).items() if made != expected[n] and not n.startswith("score/")
    ]
    for _ in range(int(os.environ.get("DRILL_KILLS", "100"))):
        process = start_job(tmp_path, stages=small)
        number = count_files(root) + rng.randint(0, 5)
        has_files = lambda n=number: count_files(root) >= n
        wait_until(lambda p=process, done=has_files: done() or p.poll() is not None)
        time.sleep(rng.uniform(0, 3))
        process.kill()
        code = process.wait()
        known = check(root, known)
        if code == 0:
            assert changed() == []
            shutil.rmtree(root)
            known = {}
    assert start_job(tmp_path, stages=small).wait() == 0
    check(root, known)
    assert results(root).keys() == expected.keys()
    assert changed() == []


def test_a_result_is_made_once_by_a_surviving_job(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
):
    log, root = tmp_path / "log.txt", tmp_path / "store"
    monkeypatch.setenv("DRILL_LOG", str(log))
    held = hold("reconstruct/3")
    plans = [steps(f"generation.seed={i % 4}") for i in range(16)]
    shared = plans[0]["reconstruct"].key
    jobs = [fork_job(one, root) for one in plans]
    place = lock_path(root / "reconstruct" / shared)
    wait_for(root, "reconstruct/*.draft/units/002.bin")
    killed = read_holder(place)
    assert killed
    os.kill(killed.pid, signal.SIGKILL)
    held.unlink()
    codes = {pid: os.waitpid(pid, 0)[1] for pid in jobs}
    assert {pid for pid, code in codes.items() if code} == {killed.pid}
    begun = log.read_text().split()
    scores = {one["score"].key for one in plans}
    assert {key: begun.count(key) for key in set(begun)} == {
        plans[0]["capture"].key: 1,
        shared: 2,
        **dict.fromkeys(scores, 1),
    }
    check(root, {})
    assert not list(root.glob("*/*.json"))  # notes of lock holders


def test_jobs_share_shards_when_one_is_killed(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
):
    """One of four jobs is killed after a random number of shards; finished ones are not remade."""
    shared, rng = "stages=shared", random.Random(0)
    expected = run_undisturbed(steps(shared), tmp_path / "undisturbed")
    monkeypatch.setenv("DRILL_SECONDS", "0.1")
    for attempt in range(100 if LONG else 2):
        root, log = tmp_path / str(attempt), tmp_path / f"{attempt}.txt"
        monkeypatch.setenv("DRILL_LOG", str(log))
        held = hold("capture/any")
        jobs = [fork_job(steps(shared), root) for _ in range(4)]
        # Each of the jobs has a shard before any of them continues.
        waiting = [held.with_name(f"hold.{pid}") for pid in jobs]
        wait_until(lambda files=waiting: all(path.exists() for path in files))
        held.unlink()
        killed, number = rng.choice(jobs), rng.randrange(20)
        wait_until(lambda path=log, n=number: len(read_shards(path)) >= n)
        os.kill(killed, signal.SIGKILL)
        known = check(root, {})
        codes = {pid: os.waitpid(pid, 0)[1] for pid in jobs}
        assert {pid for pid, code in codes.items() if code} <= {killed}
        check(root, known)
        assert results(root) == expected
        shards = read_shards(log)
        names = [name for _, name in shards]
        assert len(set(names)) == len(names)
        assert len(names) >= 23  # the killed job may have finished a shard and not logged it
        assert len({pid for pid, _ in shards}) >= 3
        assert len(list(root.glob("*/*.000*.lock"))) <= 1  # the lock of the killed job


def read_shards(log: Path) -> list[list[str]]:
    """Return the process and the name of every shard in the log."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split() for line in lines if "/" in line]


@pytest.mark.parametrize("times", [1, *([2] if LONG else [])])
def test_ctrl_c_leaves_a_clean_state(steps: Plan, tmp_path: Path, hold: Hold, times: int):
    held = hold("reconstruct/1")
    environment = {**os.environ}
    environment.pop("HYDRA_FULL_ERROR", None)
    process = start_job(tmp_path, env=environment)
    wait_for(tmp_path, "store/reconstruct/*.draft/units/000.bin")
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    if times == 1:
        assert "stopped. Finished work is kept" in error
        assert [p.name for p in tmp_path.glob("store/reconstruct/*.lock.json")] == []
    held.unlink()
    known = check(tmp_path / "store", {})
    execute_plan(steps(), ["score"], Store(tmp_path / "store"), Runtime(progress="none"))
    check(tmp_path / "store", known)


@pytest.mark.skipif(not LONG, reason="takes a minute: make drills")
def test_ctrl_c_during_training_exits_with_130(tmp_path: Path):
    process = start_job(tmp_path, stages=[*SMALL, "rounding.steps=100000"])
    try:
        wait_for(tmp_path, "store/reconstruct/*.draft/units/*.resume/fit.safetensors")
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    check(tmp_path / "store", {})


def wait_for(folder: Path, pattern: str) -> None:
    wait_until(lambda: list(folder.glob(pattern)))
