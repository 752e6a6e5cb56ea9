"""All stages on the shipped model, with few steps: the same bits each time, also after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipelines.config.resolvers import CONF
from pipelines.planning.plan import make_plan
from tests.conftest import Compose
from tests.helpers.small_runs import FEW, SEARCH, SMALL, read_files, run_stages
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.unchecked


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_stages(tmp_path_factory.mktemp("undisturbed"))


def read_metrics(folders: dict[str, Path]) -> dict:
    return json.loads((folders["score"] / "metrics.json").read_text())


def test_two_processes_make_the_same_bits(
    undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They capture three prompts, also in a job of SLURM, which starts one process."""
    slurm = {
        "JOB_ID": "1",
        "JOB_NAME": "run",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    devices = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}
    folders = run_stages(tmp_path, devices=devices, targets=["capture"])
    assert read_files(folders["capture"]) == read_files(undisturbed["capture"])


def test_every_stage_is_bit_exact_after_a_kill(undisturbed: dict[str, Path], tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pipelines.run",
        *SMALL,
        f"outputs={tmp_path}",
        "progress=none",
    ]
    job = subprocess.Popen(command, cwd=CONF.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        find_units = lambda: sorted(tmp_path.glob("store/reconstruct/*.draft/units/*.json"))
        wait_until(lambda: len(find_units()) >= 3 or job.poll() is not None)
        assert job.poll() is None, "it ended before it could be killed"
        units = find_units()
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    for path in tmp_path.glob("store/reconstruct/*"):
        assert not path.is_dir() or path.suffix == ".draft"
    times = {path.name: path.stat().st_mtime_ns for path in units}
    folders = run_stages(tmp_path)
    for name, time_ns in times.items():
        assert (folders["reconstruct"] / "units" / name).stat().st_mtime_ns == time_ns
    for stage in ("capture", "reconstruct", "activate", "generate", "reference"):
        assert read_files(folders[stage]) == read_files(undisturbed[stage]), stage
    first, second = read_metrics(undisturbed), read_metrics(folders)
    assert first["metrics"] == second["metrics"]
    assert set(first["metrics"]) == {"psnr", "ssim", "oracle", "clip"}


def test_other_activations_share_the_weights(undisturbed: dict[str, Path], composed: Compose):
    """The capture and the reconstruction of W4A8 serve W4A6 as they are."""
    stages = make_plan(composed(*SMALL, "activation=e2m3_token"))
    shared = {name for name, stage in stages.items() if undisturbed[name].name == stage.key}
    assert shared == {"capture", "reconstruct", "reference"}


def test_static_scales_of_reconstruction_are_kept(tmp_path: Path):
    """The activation scales that were in force while the weights were fitted are not changed."""
    folders = run_stages(tmp_path, "method=llmfp4_fpq", *SEARCH, small=FEW)
    fitted: dict = {}
    for path in (folders["reconstruct"] / "units").glob("*.safetensors"):
        for key, value in load_file(path).items():
            if ".input_fake_quant." in key:
                fitted[key.replace(".input_fake_quant.", ".")] = value
    scales = load_file(folders["activate"] / "scales.safetensors")
    assert any(key.endswith(".choice") for key in fitted)
    assert all(scales[key].equal(value) for key, value in fitted.items())
    assert {key.split(".")[-2] for key in scales.keys() - fitted.keys()} == {"q", "k", "v"}
    scalars = read_metrics(folders)["scalars"]
    assert scalars["bits_activation"] == 4
    assert 4 < scalars["bits_weight"] < 4.2


def test_a_method_with_transforms_is_bit_exact(tmp_path: Path):
    method = ["method=mr_gptq", "+weight.ignore=['transformer_blocks.[2-9].*']"]
    first = run_stages(tmp_path / "score", *method, small=FEW)
    second = run_stages(tmp_path / "images", *method, small=FEW, targets=["generate"])
    for stage in ("reconstruct", "activate", "generate"):
        assert read_files(first[stage]) == read_files(second[stage]), stage
    assert 15 < read_metrics(first)["metrics"]["psnr"]["mean"] < 40
