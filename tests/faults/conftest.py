import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp4dit.store import Store
from pipelines.plan import Step, execute, plan
from pipelines.runtime import Runtime
from tests.conftest import ROOT, Compose

DRILL = ["stages=drill", f"hydra.searchpath=[file://{ROOT}/tests/conf]"]
LONG = os.environ.get("DRILLS") == "long"  # as `make drills` has it
Plan = Callable[..., dict[str, Step]]


@pytest.fixture
def steps(composed: Compose) -> Plan:
    return lambda *overrides: plan(composed(*DRILL, *overrides))


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Mounts at a folder of this name, with these options, or skips where one may not mount."""
    mounted: list[Path] = []

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        kind = ["-t", "tmpfs", "none"] if place not in mounted else []
        done = subprocess.run(["mount", "-o", options, *kind, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no folder can be mounted here: {done.stderr.strip()}")
        if place not in mounted:
            mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def forked(steps: dict[str, Step], root: Path, targets: tuple[str, ...] = ("score",)) -> int:
    """A process that makes the targets as a job would, without the second that starting one takes; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            execute(steps, targets, Store(root), Runtime(progress="none"))
            code = 0
        finally:
            os._exit(code)
    return pid


def job(outputs: Path, *more: str, stages: list[str] = DRILL, **kw) -> subprocess.Popen:
    """A job as a user starts it."""
    command = [sys.executable, "-m", "pipelines.run", *stages, *more, f"outputs={outputs}", "progress=none"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.Popen(command, cwd=ROOT, **{**pipes, "env": environment, **kw})
