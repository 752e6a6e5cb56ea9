"""Sweeps that submitit runs, locally and on a simulated cluster; tests/cluster has a real one."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4dit.store.store import Store
from pipelines.planning.executor import execute_plan
from pipelines.runtime.trainer import Runtime
from tests.faults import slurm
from tests.faults.conftest import DRILL, LONG, Plan, start_job
from tests.faults.drill import check, results, units
from tests.helpers.small_runs import SMALL, read_files, run_stages
from tests.helpers.waiting import PATIENCE, wait_until

SWEEP = ["-m", *DRILL, "generation.seed=1,2"]


@pytest.fixture
def undisturbed(steps: Plan, tmp_path: Path) -> dict[str, bytes]:
    """The results of the sweep without a launcher."""
    root = tmp_path / "undisturbed"
    for seed in (1, 2):
        execute_plan(
            steps(f"generation.seed={seed}"), ["score"], Store(root), Runtime(progress="none")
        )
    return results(root)


def check_success(process: subprocess.Popen) -> None:
    """Wait for a sweep, which must succeed."""
    output = "".join(process.communicate(timeout=PATIENCE))
    assert process.returncode == 0, output


def test_jobs_of_submitit_make_the_same_results(tmp_path: Path, undisturbed: dict[str, bytes]):
    process = start_job(tmp_path / "local", "hydra/launcher=submitit_local", stages=SWEEP)
    check_success(process)
    assert results(tmp_path / "local" / "store") == undisturbed


def start_sweep(tmp_path: Path, *options: str) -> subprocess.Popen:
    """Start a sweep on the simulated cluster."""
    state = tmp_path / "slurm"
    path = f"{slurm.commands(tmp_path / 'bin')}:{os.environ['PATH']}"
    state.mkdir()
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in options)]
    environment = {**os.environ, "PATH": path, "SLURM_DRILL": str(state)}
    return start_job(tmp_path / "cluster", *launcher, stages=SWEEP, env=environment)


def test_slurm_jobs_resume_after_preemption_and_timeout(
    tmp_path: Path, undisturbed: dict[str, bytes], hold: Callable[[str], Path]
):
    """One of two jobs is killed, and SLURM queues it again, as it does with --requeue.

    The other gets the signal that announces the end of its time, and requeues itself.
    """
    held = hold("reconstruct/2")
    state, root = tmp_path / "slurm", tmp_path / "cluster" / "store"
    resources = ["partition=gpu", "timeout_min=10", "gpus_per_node=2", "mem_gb=64"]
    process = start_sweep(tmp_path, *resources)
    pid = lambda task: int(wait_until(lambda: read_text(state / f"pid_7_{task}")))
    wait_until(lambda: list(tmp_path.glob("hold.*")))  # a job has made units, the other waits
    known = units(root)
    (state / "requeue_7_0").touch()
    os.kill(pid(0), signal.SIGKILL)
    # A job handles signals once it has written its config.
    wait_until(lambda: list((tmp_path / "cluster" / "sweeps").glob("*/1/.hydra")))
    os.kill(pid(1), signal.SIGUSR2)
    held.unlink()
    check_success(process)
    assert "Requeued job 7_1 (19 remaining timeouts)" in read_log(tmp_path, "7_1")
    check(root, known)
    assert results(root) == undisturbed
    lines = (state / "script").read_text().splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines}
    assert options >= {
        "partition=gpu",
        "time=10",
        "gpus-per-node=2",
        "mem=64GB",
        "cpus-per-task=4",
        "requeue",
        "signal=USR2@120",
        "nodes=1",
        "ntasks-per-node=1",
        "array=0-1%2",
        "open-mode=append",
    }


def read_text(path: Path) -> str:
    """Return the text of a file, or nothing if it does not exist."""
    return path.read_text() if path.exists() else ""


def read_log(outputs: Path, job: str) -> str:
    files = (outputs / "cluster" / "sweeps").glob(f"*/.submitit/{job}/*_log.*")
    return "".join(file.read_text() for file in files)


@pytest.mark.skipif(not LONG, reason="takes minutes: make drills")
def test_one_two_and_three_processes_draw_the_same_images(tmp_path: Path):
    small = [*SMALL, "prompts.count=3", "generation.batch_size=1"]
    cpu = {"accelerator": "cpu", "strategy": "ddp_spawn"}
    one, *others = (
        run_stages(tmp_path / str(n), small=small, devices={**cpu, "devices": n}) for n in (1, 2, 3)
    )
    for other in others:
        assert read_files(other["generate"]) == read_files(one["generate"])
        assert read_files(other["reference"]) == read_files(one["reference"])
