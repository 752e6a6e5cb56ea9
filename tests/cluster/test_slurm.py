"""Sweeps on a SLURM cluster give the same results when jobs lose a node, a slot or their time."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4dit.store.store import Store
from pipelines.planning.executor import execute_plan
from pipelines.runtime.trainer import Runtime
from tests.cluster.cluster import Cluster, start_cluster
from tests.faults.conftest import DRILL, Plan, start_job
from tests.faults.drill import check, results, units
from tests.helpers.waiting import PATIENCE, wait_until

PARTS = ["stages=shared", DRILL[1]]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "slurm").mkdir()
    with start_cluster(tmp_path / "slurm", ("one", "two")) as running_cluster:
        yield running_cluster


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def sweep(
    slurm: Cluster, outputs: Path, seconds: float, *options: str, stages: list[str] = DRILL
) -> subprocess.Popen:
    """Start a sweep of two jobs, as on a node of a cluster.

    `seconds` is the time that a unit takes.
    """
    resources = ["partition=gpu", "mem_gb=4", "cpus_per_task=1", *options]
    environment = {
        **slurm.environment,
        "DRILL_SECONDS": str(seconds),
        "DRILL_LOG": f"{outputs}.made",
    }
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in resources)]
    return start_job(
        outputs, *launcher, "generation.seed=1,2", stages=["-m", *stages], env=environment
    )


def wait_for_units(outputs: Path) -> dict[str, tuple[int, int]]:
    """Wait until a job has made two units, and return those that exist."""
    root = outputs / "store"

    def find_units() -> dict[str, tuple[int, int]]:
        existing = units(root) if root.exists() else {}
        return existing if len(existing) > 1 else {}

    return wait_until(find_units)


def check_sweep(
    process: subprocess.Popen[str], outputs: Path, steps: Plan, stages: list[str] = DRILL
) -> None:
    """Check that a sweep succeeds, with the results of its jobs without a cluster."""
    output = "".join(process.communicate(timeout=PATIENCE))
    assert process.returncode == 0, output
    alone = outputs.with_name("alone")
    for seed in (1, 2):
        execute_plan(
            steps(*stages, f"generation.seed={seed}"),
            ["score"],
            Store(alone),
            Runtime(progress="none"),
        )
    assert results(outputs / "store") == results(alone)


def list_states(slurm: Cluster) -> list[str]:
    """Return the final state of each start of the first job."""
    output = slurm.run(
        "sacct", "-j", "1", "--duplicates", "--allocations", "--noheader", "-P", "-o", "JobID,State"
    )
    return [line.split("|")[1] for line in output.splitlines() if line.startswith("1_0|")]


def test_jobs_on_two_nodes_share_what_has_parts(slurm: Cluster, outputs: Path, steps: Plan):
    check_sweep(sweep(slurm, outputs, 0.4, "nodes=2", stages=PARTS), outputs, steps, PARTS)
    lines = outputs.with_suffix(".made").read_text().splitlines()
    ranks, shards = zip(*(line.split() for line in lines if "/" in line), strict=True)
    assert {*ranks} == {"0", "1"}
    assert len(shards) == len({*shards}) == 3 * 12
    assert wait_until(lambda: list_states(slurm) == ["COMPLETED"])


def test_a_job_continues_on_another_node_after_a_failure(
    slurm: Cluster, outputs: Path, steps: Plan
):
    process = sweep(slurm, outputs, 1)
    known = wait_for_units(outputs)
    slurm.cut_off("one")
    check_sweep(process, outputs, steps)
    check(outputs / "store", known)
    assert wait_until(lambda: list_states(slurm) == ["NODE_FAIL", "COMPLETED"])


def test_a_preempted_job_on_two_nodes_resumes(slurm: Cluster, outputs: Path, steps: Plan):
    process = sweep(slurm, outputs, 1, "nodes=2", stages=PARTS)
    known = wait_for_units(outputs)
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "1")
    check_sweep(process, outputs, steps, PARTS)
    check(outputs / "store", known)
    assert wait_until(lambda: list_states(slurm) == ["PREEMPTED", "COMPLETED"])


def test_a_job_out_of_time_requeues_itself(slurm: Cluster, outputs: Path, steps: Plan):
    process = sweep(slurm, outputs, 3, "timeout_min=1", "signal_delay_s=20")
    known = wait_for_units(outputs)
    check_sweep(process, outputs, steps)
    check(outputs / "store", known)
    assert list_states(slurm)[0] == "REQUEUED"


def test_a_killed_job_is_named_and_can_be_resumed(slurm: Cluster, outputs: Path, steps: Plan):
    """The error names the killed job, and the same command continues its work."""
    process = sweep(slurm, outputs, 1)
    known = wait_for_units(outputs)
    slurm.run("scancel", "1_0")
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert error.startswith("error: job 1_0 ended without a result (state: CANCELLED by 0)"), error
    assert "Traceback" not in out + error
    check_sweep(sweep(slurm, outputs, 0.1), outputs, steps)
    check(outputs / "store", known)
