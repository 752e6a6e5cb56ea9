"""Sweeps that submitit runs: on this machine, and on what looks like a cluster; tests/cluster has a real one."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fp4dit.store import Store
from pipelines.plan import execute
from pipelines.runtime import Runtime
from tests.conftest import until
from tests.faults import slurm
from tests.faults.conftest import DRILL, LONG, Plan, job
from tests.faults.drill import check, results, units
from tests.test_end_to_end import SMALL, contents, run

SWEEP = ["-m", *DRILL, "generation.seed=1,2"]


@pytest.fixture
def undisturbed(steps: Plan, tmp_path: Path) -> dict[str, bytes]:
    """What the sweep makes without a launcher."""
    root = tmp_path / "undisturbed"
    for seed in (1, 2):
        execute(steps(f"generation.seed={seed}"), ["score"], Store(root), Runtime(progress="none"))
    return results(root)


def test_jobs_of_submitit_make_what_others_make(tmp_path: Path, undisturbed: dict[str, bytes]):
    process = job(tmp_path / "local", "hydra/launcher=submitit_local", stages=SWEEP)
    assert process.wait(100) == 0
    assert results(tmp_path / "local" / "store") == undisturbed


def cluster(tmp_path: Path, *options: str) -> subprocess.Popen:
    """A sweep as it is given on a node of one."""
    state = tmp_path / "slurm"
    path = f"{slurm.commands(tmp_path / 'bin')}:{os.environ['PATH']}"
    state.mkdir()
    given = ["hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in options)]
    own = {**os.environ, "PATH": path, "SLURM_DRILL": str(state), "DRILL_SECONDS": "0.15"}
    return job(tmp_path / "cluster", *given, stages=SWEEP, env=own)


def test_a_job_of_slurm_goes_on_after_a_preemption_and_after_its_time(tmp_path: Path, undisturbed: dict[str, bytes]):
    """One of two is killed, and queued again as SLURM does where --requeue is given; the other gets the signal that is
    sent before the end of its time, and has itself queued again."""
    state, root = tmp_path / "slurm", tmp_path / "cluster" / "store"
    options = ["partition=gpu", "timeout_min=10", "gpus_per_node=2", "mem_gb=64"]
    process = cluster(tmp_path, *options)
    pid = lambda task: int(until(lambda: (p := state / f"pid_7_{task}").exists() and p.read_text()))
    known = until(lambda: (made := units(root) if root.exists() else {}) and len(made) > 1 and made)
    (state / "requeue_7_0").touch()
    os.kill(pid(0), signal.SIGKILL)
    until(lambda: list((tmp_path / "cluster" / "sweeps").glob("*/1/.hydra")))  # then it listens to signals
    os.kill(pid(1), signal.SIGUSR2)
    assert process.wait(100) == 0
    assert "Requeued job 7_1 (19 remaining timeouts)" in log(tmp_path, "7_1")
    check(root, known)
    assert results(root) == undisturbed
    asked = [line.removeprefix("#SBATCH --") for line in (state / "script").read_text().splitlines()]
    wanted = {"partition=gpu", "time=10", "gpus-per-node=2", "mem=64GB", "cpus-per-task=4", "requeue"}
    assert wanted | {"signal=USR2@120", "nodes=1", "ntasks-per-node=1", "array=0-1%2", "open-mode=append"} <= {*asked}


def log(outputs: Path, job: str) -> str:
    files = (outputs / "cluster" / "sweeps").glob(f"*/.submitit/{job}/*_log.*")
    return "".join(file.read_text() for file in files)


@pytest.mark.skipif(not LONG, reason="takes minutes: make drills")
def test_one_two_and_three_processes_draw_the_same_images(tmp_path: Path):
    small = [*SMALL, "prompts.count=3", "generation.chunk=1"]
    cpu = {"accelerator": "cpu", "strategy": "ddp_spawn"}
    one, *others = (run(tmp_path / str(n), small=small, devices={**cpu, "devices": n}) for n in (1, 2, 3))
    for other in others:
        assert contents(other["generate"]) == contents(one["generate"])
        assert contents(other["reference"]) == contents(one["reference"])
