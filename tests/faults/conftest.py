"""Fixtures of the drills: plans, full disks, jobs, and points at which jobs wait."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp4dit.store.store import Store
from pipelines.planning.executor import execute_plan
from pipelines.planning.plan import PlannedStage, make_plan
from pipelines.runtime.trainer import Runtime
from tests.conftest import ROOT, Compose

DRILL = ["stages=drill", f"hydra.searchpath=[file://{ROOT}/tests/conf]"]
LONG = os.environ.get("DRILLS") == "long"  # set by `make drills`
Plan = Callable[..., dict[str, PlannedStage]]


@pytest.fixture
def steps(composed: Compose) -> Plan:
    """A function that plans stages=drill with overrides."""
    return lambda *overrides: make_plan(composed(*DRILL, *overrides))


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """A function that mounts a folder of this name, or skips the test if mounting is forbidden."""
    mounted: list[Path] = []

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        kind = ["-t", "tmpfs", "none"] if place not in mounted else []
        done = subprocess.run(
            ["mount", "-o", options, *kind, str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no folder can be mounted here: {done.stderr.strip()}")
        if place not in mounted:
            mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fork_job(
    steps: dict[str, PlannedStage], root: Path, targets: tuple[str, ...] = ("score",)
) -> int:
    """Fork a process that runs a plan up to the targets, and return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            execute_plan(steps, targets, Store(root), Runtime(progress="none"))
            code = 0
        finally:
            os._exit(code)
    return pid


def start_job(outputs: Path, *more: str, stages: list[str] = DRILL, **kw) -> subprocess.Popen:
    """Start a job as a user does."""
    command = [
        sys.executable,
        "-m",
        "pipelines.run",
        *stages,
        *more,
        f"outputs={outputs}",
        "progress=none",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    options = {**pipes, "env": environment, "preexec_fn": enable_interrupts, **kw}
    return subprocess.Popen(command, cwd=ROOT, **options)


def enable_interrupts() -> None:
    """Undo `nohup` and background shells, whose processes ignore SIGINT as do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def has_ended(pid: int) -> bool:
    """Return True if a child process has ended. It can still be waited for."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, flags) is not None


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make processes wait at a point (see `drill.wait_at`) until the returned file is removed."""

    def make_file(point: str) -> Path:
        path = tmp_path / "hold"
        path.write_text(point)
        monkeypatch.setenv("DRILL_HOLD", str(path))
        return path

    return make_file
