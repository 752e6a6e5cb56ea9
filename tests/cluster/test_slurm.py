"""Sweeps on a cluster of SLURM, whose jobs lose their node, their place or their time, end with the bytes of others."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4dit.store import Store
from pipelines.plan import execute
from pipelines.runtime import Runtime
from tests.cluster.cluster import Cluster, cluster
from tests.conftest import until
from tests.faults.conftest import DRILL, Plan, job
from tests.faults.drill import check, results, units

PARTS = ["stages=shared", DRILL[1]]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "slurm").mkdir()
    with cluster(tmp_path / "slurm", ("one", "two")) as made:
        yield made


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def sweep(slurm: Cluster, outputs: Path, seconds: float, *options: str, stages: list[str] = DRILL) -> subprocess.Popen:
    """Two jobs, given as on a node of a cluster; a unit takes so many seconds."""
    given = ["partition=gpu", "mem_gb=4", "cpus_per_task=1", *options]
    own = {**slurm.environment, "DRILL_SECONDS": str(seconds), "DRILL_LOG": f"{outputs}.made"}
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in given)]
    return job(outputs, *launcher, "generation.seed=1,2", stages=["-m", *stages], env=own)


def begun(outputs: Path) -> dict[str, tuple[int, int]]:
    """The first units, once they are made."""
    root = outputs / "store"
    return until(lambda: (made := units(root) if root.exists() else {}) and len(made) > 1 and made)


def finished(process: subprocess.Popen[str], outputs: Path, steps: Plan, stages: list[str] = DRILL) -> None:
    """That the sweep ends well, with what its jobs make without a cluster."""
    said = "".join(process.communicate(timeout=400))
    assert process.returncode == 0, said
    alone = outputs.with_name("alone")
    for seed in (1, 2):
        execute(steps(*stages, f"generation.seed={seed}"), ["score"], Store(alone), Runtime(progress="none"))
    assert results(outputs / "store") == results(alone)


def ends(slurm: Cluster) -> list[str]:
    """How each start of the first job ended."""
    said = slurm.ask("sacct", "-j", "1", "--duplicates", "--allocations", "--noheader", "-P", "-o", "JobID,State")
    return [line.split("|")[1] for line in said.splitlines() if line.startswith("1_0|")]


def test_jobs_on_two_nodes_share_what_has_parts(slurm: Cluster, outputs: Path, steps: Plan):
    finished(sweep(slurm, outputs, 0.4, "nodes=2", stages=PARTS), outputs, steps, PARTS)
    said = outputs.with_suffix(".made").read_text().splitlines()
    ranks, made = zip(*(line.split() for line in said if "/" in line), strict=True)
    assert {*ranks} == {"0", "1"}
    assert len(made) == len({*made}) == 3 * 12
    assert until(lambda: ends(slurm) == ["COMPLETED"])


def test_a_job_whose_node_fails_goes_on_on_another(slurm: Cluster, outputs: Path, steps: Plan):
    process = sweep(slurm, outputs, 1)
    known = begun(outputs)
    slurm.cut_off("one")
    finished(process, outputs, steps)
    check(outputs / "store", known)
    assert until(lambda: ends(slurm) == ["NODE_FAIL", "COMPLETED"])


def test_a_job_on_two_nodes_that_is_preempted_goes_on_afterwards(slurm: Cluster, outputs: Path, steps: Plan):
    process = sweep(slurm, outputs, 1, "nodes=2", stages=PARTS)
    known = begun(outputs)
    slurm.ask("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "1")
    finished(process, outputs, steps, PARTS)
    check(outputs / "store", known)
    assert until(lambda: ends(slurm) == ["PREEMPTED", "COMPLETED"])


def test_a_job_that_is_out_of_time_has_itself_queued_again(slurm: Cluster, outputs: Path, steps: Plan):
    process = sweep(slurm, outputs, 3, "timeout_min=1", "signal_delay_s=20")
    known = begun(outputs)
    finished(process, outputs, steps)
    check(outputs / "store", known)
    assert ends(slurm)[0] == "REQUEUED"


def test_a_job_that_is_killed_is_named_and_the_same_command_goes_on(slurm: Cluster, outputs: Path, steps: Plan):
    process = sweep(slurm, outputs, 1)
    known = begun(outputs)
    slurm.ask("scancel", "1_0")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert error.startswith("error: job 1_0 ended without a result (state: CANCELLED by 0)"), error
    assert "Traceback" not in out + error
    finished(sweep(slurm, outputs, 0.1), outputs, steps)
    check(outputs / "store", known)
