"""The simulated sweep beside closed forms and bounds that every schedule obeys."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling import Task, critical, distinct, report, schedule, tasks
from pipelines.plan import plan
from tests.conftest import Compose


def job(*stages: tuple[str, float]) -> list[Task]:
    """A chain: each stage needs the one before it."""
    keys = [key for key, _ in stages]
    return [Task("generate", key, seconds, 10, keys[i - 1 : i]) for i, (key, seconds) in enumerate(stages)]


@pytest.mark.parametrize("workers", [1, 2, 3, 10])
def test_equal_jobs_take_as_many_rounds_as_there_are(workers: int):
    jobs = [job((f"own {k}", 7.0)) for k in range(10)]
    assert schedule(jobs, workers) == 7 * math.ceil(10 / workers)


def test_a_shared_stage_is_made_once_and_waited_for():
    jobs = [job(("shared", 100.0), (f"own {k}", 10.0)) for k in range(4)]
    assert schedule(jobs, 1) == 140
    assert schedule(jobs, 2) == 120
    assert schedule(jobs, 4) == critical(jobs) == 110


def test_devices_of_a_job_share_what_can_be_shared():
    jobs = [[Task("reconstruct", "a", 80.0, 0, []), Task("generate", "b", 80.0, 0, ["a"])]]
    assert [schedule(jobs, 1, devices) for devices in (1, 4)] == [160, 100]
    assert critical(jobs, 4) == 100


@settings(max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=4), min_size=1), st.integers(1, 5))
def test_no_schedule_beats_its_bounds(given: list[list[tuple[int, int]]], workers: int):
    length: dict[int, float] = {}  # a key is the same stage everywhere
    jobs = [
        job(*[(f"{k:02}", length.setdefault(k, float(s))) for k, s in sorted({k: s for k, s in one}.items())])
        for one in given
    ]
    work = sum(task.seconds for task in distinct(jobs).values())
    found = schedule(jobs, workers)
    longest = max((task.seconds for task in distinct(jobs).values()), default=0)
    assert max(work / workers, longest) <= found + 1e-9
    assert found <= work
    assert schedule(jobs, 1) == pytest.approx(work)


def test_rows_that_share_a_stage_have_its_key(composed: Compose):
    first, second = (tasks(plan(composed(f"activation={name}_token"))) for name in ("e3m4", "e2m1"))
    keys = [{task.stage: task.key for task in job} for job in (first, second)]
    assert [stage for stage in keys[0] if keys[0][stage] == keys[1][stage]] == ["capture", "reconstruct", "reference"]
    assert all(task.seconds > 0 for task in first)
    assert {task.stage: task.disk for task in first}["generate"] > 0
    lines = list(report([first, second], (1, 2), (1, 2)))
    assert lines[0].startswith("2 jobs, 9 stages, ")
    assert len([line for line in lines if line.startswith("| 2 |")]) == 2
