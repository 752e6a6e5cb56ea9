"""Processes that are killed, and processes that want the same."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from fp4dit.locks import holder
from fp4dit.store import Store, lock
from pipelines.plan import execute
from pipelines.runtime import Runtime
from tests.conftest import until
from tests.faults.conftest import LONG, Plan, forked, job
from tests.faults.drill import check, results
from tests.test_end_to_end import SMALL


def undisturbed(steps, root: Path) -> dict[str, bytes]:
    execute(steps, ["score"], Store(root), Runtime(progress="none"))
    return results(root)


def test_kills_at_random_moments_lose_nothing_finished(steps: Plan, tmp_path: Path):
    """One job after another on the same store, which is begun anew as soon as one gets through."""
    planned, root, rng = steps(), tmp_path / "store", random.Random(0)
    start = time.monotonic()
    expected = undisturbed(planned, tmp_path / "undisturbed")
    longest, kills, whole_runs, known = time.monotonic() - start, 0, 0, {}
    while kills < (400 if LONG else 25) or whole_runs < 2:
        pid = forked(planned, root)
        time.sleep(rng.uniform(0, longest / 3))
        os.kill(pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        known = check(root, known)
        kills += code == signal.SIGKILL
        if code == 0:
            assert results(root) == expected
            shutil.rmtree(root)
            known, whole_runs = {}, whole_runs + 1
    assert undisturbed(planned, root) == expected
    check(root, known)
    assert not list(root.glob("*/*.draft*"))


@pytest.mark.skipif(not LONG, reason="takes minutes: make drills")
def test_kills_of_the_real_thing_lose_nothing_finished(tmp_path: Path):
    small = [*SMALL, "prompts.count=1"]
    assert job(tmp_path / "undisturbed", stages=small).wait() == 0
    expected, rng, known, root = results(tmp_path / "undisturbed" / "store"), random.Random(0), {}, tmp_path / "store"
    changed = lambda: [n for n, made in results(root).items() if made != expected[n] and not n.startswith("score/")]
    for _ in range(int(os.environ.get("DRILL_KILLS", "100"))):
        process = job(tmp_path, stages=small)
        time.sleep(rng.uniform(3, 9))
        process.kill()
        code = process.wait()
        known = check(root, known)
        if code == 0:
            assert changed() == []
            shutil.rmtree(root)
            known = {}
    assert job(tmp_path, stages=small).wait() == 0
    check(root, known)
    assert results(root).keys() == expected.keys()
    assert changed() == []


def test_jobs_that_want_the_same_make_it_once_and_replace_who_is_killed(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log, root = tmp_path / "log.txt", tmp_path / "store"
    monkeypatch.setenv("DRILL_LOG", str(log))
    monkeypatch.setenv("DRILL_SECONDS", "0.1")
    plans = [steps(f"generation.seed={i % 4}") for i in range(16)]
    shared = plans[0]["reconstruct"].key
    jobs = [forked(one, root) for one in plans]
    place = lock(root / "reconstruct" / shared)
    wait_for(root, "reconstruct/*.draft/units/002.bin")
    killed = holder(place)
    assert killed
    os.kill(killed.pid, signal.SIGKILL)
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
    assert not list(root.glob("*/*.json"))  # that of a holder


def test_jobs_that_want_the_same_share_its_parts_whoever_is_killed(
    steps: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Four of them, of which one is killed at a random moment: nothing that is finished is made again."""
    shared, rng, most = "stages=shared", random.Random(0), 0
    expected = undisturbed(steps(shared), tmp_path / "undisturbed")
    monkeypatch.setenv("DRILL_SECONDS", "0.1")  # so that one alone is not done before the others look again
    for attempt in range(100 if LONG else 2):
        root, log = tmp_path / str(attempt), tmp_path / f"{attempt}.txt"
        monkeypatch.setenv("DRILL_LOG", str(log))
        jobs = [forked(steps(shared), root) for _ in range(4)]
        time.sleep(rng.uniform(0.1, 2))
        killed = rng.choice(jobs)
        os.kill(killed, signal.SIGKILL)
        known = check(root, {})
        codes = {pid: os.waitpid(pid, 0)[1] for pid in jobs}
        assert {pid for pid, code in codes.items() if code} <= {killed}
        check(root, known)
        assert results(root) == expected
        made = [line.split() for line in log.read_text().splitlines() if "/" in line]
        names = [name for _, name in made]
        assert len(set(names)) == 24
        assert len(names) - len(set(names)) <= 1  # which was made, but not said, when its maker was killed
        most = max(most, len({pid for pid, _ in made}))
        assert len(list(root.glob("*/*.000*.lock"))) <= 1  # of the one killed
    assert most > 1


@pytest.mark.parametrize("times", [1, *([2] if LONG else [])])
def test_ctrl_c_asks_nothing_and_leaves_a_clean_state(steps: Plan, tmp_path: Path, times: int):
    environment = {**os.environ, "DRILL_SECONDS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    process = job(tmp_path, env=environment)
    wait_for(tmp_path, "store/reconstruct/*.draft/units/000.bin")
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    if times == 1:
        assert "stopped. What was finished is kept" in error
        assert [p.name for p in tmp_path.glob("store/reconstruct/*.lock.json")] == []
    known = check(tmp_path / "store", {})
    execute(steps(), ["score"], Store(tmp_path / "store"), Runtime(progress="none"))
    check(tmp_path / "store", known)


@pytest.mark.skipif(not LONG, reason="takes a minute: make drills")
def test_ctrl_c_while_lightning_learns_is_130_too(tmp_path: Path):
    process = job(tmp_path, stages=[*SMALL, "rounding.steps=100000"])
    try:
        wait_for(tmp_path, "store/reconstruct/*.draft/units")
        time.sleep(5)  # it learns by now
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    check(tmp_path / "store", {})


def wait_for(folder: Path, pattern: str) -> None:
    until(lambda: list(folder.glob(pattern)))
