"""Runs of the shipped model with few prompts and few steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4dit.store.store import Store
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import register_resolvers
from pipelines.planning.executor import execute_plan
from pipelines.planning.plan import make_plan
from pipelines.runtime.trainer import Runtime

CPU = {"accelerator": "cpu", "devices": 1}

SMALL = [
    "calibration.num_prompts=2",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=1",
    "prompts.count=2",
    "rounding.steps=3",
    "generation.steps=2",
]

# Without an option of the rounding method, so that it can be any.
FEW = [
    "calibration.num_prompts=4",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=5",
    "calibration.steps=2",
    "generation.steps=2",
    "generation.batch_size=2",
    "prompts.count=2",
]

# Options of the output search of LLM-FP4.
SEARCH = [
    "rounding.candidates.count=3",
    "rounding.rounds=1",
    "rounding.tokens=64",
]


def run_stages(
    outputs: Path,
    *overrides: str,
    small: Sequence[str] = SMALL,
    devices: Mapping[str, Any] = CPU,
    targets: Sequence[str] = ("score",),
) -> dict[str, Path]:
    """Run the targets, and what they need, in this process; return the folders of all stages."""
    register_resolvers()
    stages = make_plan(compose_config("run", [*small, *overrides, f"outputs={outputs}"]))
    store = Store(outputs / "store")
    execute_plan(stages, targets, store, Runtime(devices, "none"))
    return {name: store.get_path(name, stage.key) for name, stage in stages.items()}


def read_files(folder: Path) -> dict[str, bytes]:
    """Return every file of a stage's folder by name, except the manifest, which has the time."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents
