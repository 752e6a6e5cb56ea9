"""The whole way on the shipped model, with few steps: the same bits each time, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from fp4dit.store import Store
from pipelines.plan import execute, plan
from pipelines.resolvers import CONF, register
from pipelines.runtime import Runtime
from tests.conftest import Compose

pytestmark = pytest.mark.unchecked

SMALL = [
    "calibration.trained=2",
    "calibration.held_out=1",
    "calibration.chunk=1",
    "prompts.count=2",
    "rounding.steps=3",
    "generation.steps=2",
]
CPU = {"accelerator": "cpu", "devices": 1}


def run(
    outputs: Path,
    *overrides: str,
    small: Sequence[str] = SMALL,
    devices: dict = CPU,
    targets: Sequence[str] = ("score",),
) -> dict[str, Path]:
    """The folders of all stages, made in this process, or of those that the targets need."""
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        steps = plan(compose("run", [*small, *overrides, f"outputs={outputs}"]))
    store = Store(outputs / "store")
    execute(steps, targets, store, Runtime(devices, "none"))
    return {name: store.path(name, step.key) for name, step in steps.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a stage by name; the manifest, which says when, is not compared."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Path]:
    return run(tmp_path_factory.mktemp("undisturbed"))


def test_every_stage_leaves_the_same_bits_twice(undisturbed, tmp_path):
    again = run(tmp_path)
    for stage in ("capture", "reconstruct", "activate", "generate", "reference"):
        assert contents(again[stage]) == contents(undisturbed[stage]), stage
    scores = [json.loads((paths["score"] / "metrics.json").read_text()) for paths in (undisturbed, again)]
    assert scores[0]["metrics"] == scores[1]["metrics"]
    assert set(scores[0]["metrics"]) == {"psnr", "ssim", "oracle", "clip"}


def test_three_processes_leave_the_same_bits_as_one(undisturbed, tmp_path, monkeypatch):
    """Each captures one of three prompts, whose seed goes with it, also in a job of SLURM, which starts one process."""
    slurm = {"JOB_ID": "1", "JOB_NAME": "run", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    three = {"accelerator": "cpu", "devices": 3, "strategy": "ddp_spawn"}
    assert contents(run(tmp_path, devices=three, targets=["capture"])["capture"]) == contents(undisturbed["capture"])


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bits(undisturbed, tmp_path):
    command = [sys.executable, "-m", "pipelines.run", *SMALL, f"outputs={tmp_path}", "progress=none"]
    job = subprocess.Popen(command, cwd=CONF.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.time() + 120
        while len(units := sorted(tmp_path.glob("store/reconstruct/*.draft/units/*.json"))) < 3:
            assert job.poll() is None, "it ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.02)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not [p for p in tmp_path.glob("store/reconstruct/*") if p.is_dir() and p.suffix != ".draft"]
    made = {p.name: p.stat().st_mtime_ns for p in units}
    paths = run(tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in (paths["reconstruct"] / "units").iterdir() if p.name in made} == made
    for stage in ("reconstruct", "generate"):
        assert contents(paths[stage]) == contents(undisturbed[stage]), stage


def test_rows_that_differ_in_activations_share_their_weights(undisturbed, composed: Compose):
    """The capture and the reconstruction of W4A8 serve W4A6 as they are."""
    other = plan(composed(*SMALL, "activation=e2m3_token"))
    assert {name for name, step in other.items() if undisturbed[name].name == step.key} == {
        "capture",
        "reconstruct",
        "reference",
    }


FEW = ["calibration.trained=4", "calibration.held_out=1", "calibration.chunk=5", "calibration.steps=2"]
FEW += ["generation.steps=2", "generation.chunk=2", "prompts.count=2"]
SEARCH = [
    "rounding.candidates.count=3",
    "rounding.rounds=1",
    "rounding.tokens=64",
]


def test_inputs_that_are_static_while_weights_are_fitted_keep_their_scales(tmp_path):
    paths = run(tmp_path, "method=llmfp4_fpq", *SEARCH, small=FEW)
    fitted: dict = {}
    for path in (paths["reconstruct"] / "units").glob("*.safetensors"):
        fitted |= {k.replace(".activation.", "."): v for k, v in load_file(path).items() if ".activation." in k}
    kept = load_file(paths["activate"] / "scales.safetensors")
    assert any(key.endswith(".choice") for key in fitted)
    assert all(kept[key].equal(value) for key, value in fitted.items())
    assert {key.split(".")[-2] for key in kept.keys() - fitted.keys()} == {"q", "k", "v"}
    scalars = json.loads((paths["score"] / "metrics.json").read_text())["scalars"]
    assert (scalars["bits_activation"], 4 < scalars["bits_weight"] < 4.2) == (4, True)


def test_a_method_with_transforms_leaves_the_same_bits_twice(tmp_path):
    first, second = (run(tmp_path / end, "method=mr_gptq", small=FEW, targets=[end]) for end in ("score", "generate"))
    for stage in ("reconstruct", "activate", "generate"):
        assert contents(first[stage]) == contents(second[stage]), stage
    psnr = json.loads((first["score"] / "metrics.json").read_text())["metrics"]["psnr"]["mean"]
    assert 15 < psnr < 40
