"""The simulated sweep against closed forms and the bounds of every schedule."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling import (
    Task,
    critical_path,
    distinct_tasks,
    format_report,
    plan_tasks,
    simulate_schedule,
)
from pipelines.planning.plan import make_plan
from tests.conftest import Compose


def job(*stages: tuple[str, float]) -> list[Task]:
    """Return a chain of stages, each of which needs the previous one."""
    keys = [key for key, _ in stages]
    return [
        Task("generate", key, seconds, 10, keys[i - 1 : i])
        for i, (key, seconds) in enumerate(stages)
    ]


@pytest.mark.parametrize("workers", [1, 2, 3, 10])
def test_equal_jobs_take_as_many_rounds_as_there_are(workers: int):
    jobs = [job((f"private {k}", 7.0)) for k in range(10)]
    assert simulate_schedule(jobs, workers) == 7 * math.ceil(10 / workers)


def test_a_shared_stage_runs_once():
    jobs = [job(("shared", 100.0), (f"private {k}", 10.0)) for k in range(4)]
    assert simulate_schedule(jobs, 1) == 140
    assert simulate_schedule(jobs, 2) == 120
    assert simulate_schedule(jobs, 4) == critical_path(jobs) == 110


def test_devices_of_a_job_share_shardable_stages():
    jobs = [[Task("reconstruct", "a", 80.0, 0, []), Task("generate", "b", 80.0, 0, ["a"])]]
    assert [simulate_schedule(jobs, 1, devices) for devices in (1, 4)] == [160, 100]
    assert critical_path(jobs, 4) == 100


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=4), min_size=1),
    st.integers(1, 5),
)
def test_no_schedule_beats_its_bounds(chains: list[list[tuple[int, int]]], workers: int):
    length: dict[int, float] = {}  # a key is the same stage everywhere
    jobs = []
    for chain in chains:
        stages = [
            (f"{k:02}", length.setdefault(k, float(s))) for k, s in sorted(dict(chain).items())
        ]
        jobs.append(job(*stages))
    work = sum(task.seconds for task in distinct_tasks(jobs).values())
    duration = simulate_schedule(jobs, workers)
    longest = max((task.seconds for task in distinct_tasks(jobs).values()), default=0)
    assert max(work / workers, longest) <= duration + 1e-9
    assert duration <= work
    assert simulate_schedule(jobs, 1) == pytest.approx(work)


def test_rows_that_share_a_stage_have_its_key(composed: Compose):
    first, second = (
        plan_tasks(make_plan(composed(f"activation={name}_token"))) for name in ("e3m4", "e2m1")
    )
    keys = [{task.stage: task.key for task in job} for job in (first, second)]
    assert [stage for stage in keys[0] if keys[0][stage] == keys[1][stage]] == [
        "capture",
        "reconstruct",
        "reference",
    ]
    assert all(task.seconds > 0 for task in first)
    assert {task.stage: task.disk for task in first}["generate"] > 0
    lines = list(format_report([first, second], (1, 2), (1, 2)))
    assert lines[0].startswith("2 jobs, 9 stages, ")
    assert len([line for line in lines if line.startswith("| 2 |")]) == 2
