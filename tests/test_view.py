"""What W&B is shown is read back from the file that an offline run leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fp4dit.store import Store
from pipelines.plan import execute, plan
from pipelines.runtime import Runtime
from pipelines.view import WandbView
from tests.conftest import TOY, Compose


def records(root: Path) -> list[dict[str, Any]]:
    (file,) = root.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def parts(shown: list[dict[str, Any]], kind: str, part: str) -> list[dict[str, Any]]:
    return [record[kind][part] for record in shown if record["type"] == kind and part in record[kind]]


@pytest.fixture
def job(composed: Compose, tmp_path: Path):
    config = composed(*TOY)
    steps, store = plan(config), Store(tmp_path / "store")
    execute(steps, ["score"], store, Runtime())
    return config, steps, store


def view(tmp_path: Path, **changes: Any) -> WandbView:
    given = {"mode": "offline", "dir": str(tmp_path), "group": "demo", "job_type": "fp4dit", "name": "a=1", "images": 4}
    return WandbView("fp4dit", **{**given, **changes})


@pytest.fixture
def shown(job, tmp_path: Path) -> list[dict[str, Any]]:
    view(tmp_path).show(*job)
    return records(tmp_path)


def test_a_run_shows_the_whole_job(shown: list[dict[str, Any]], job, tmp_path: Path):
    _, steps, _ = job
    (run,) = (record["run"] for record in shown if record["type"] == "run")
    assert [run[key] for key in ("project", "run_group", "job_type", "display_name")] == [
        *("fp4dit", "demo", "fp4dit", "a=1")
    ]
    config = run["config"]["update"]
    assert config["keys"] == {name: step.key for name, step in steps.items()}
    assert config["generation"]["steps"] == 20
    assert "${" not in json.dumps(config)

    history = parts(shown, "history", "item")
    curve = [(line["step"], line["transformer_blocks.1/error"]) for line in history if "step" in line]
    assert curve == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    (images,) = (line for line in history if "images.nrows" in line)
    assert (images["images.nrows"], images["images.ncols"]) == (4, 3)
    assert any("sqnr.nrows" in line for line in history)
    metrics = [record["metric"] for record in shown if record["type"] == "metric"]
    assert {m["glob_name"]: m["step_metric"] for m in metrics if "glob_name" in m} == {
        "transformer_blocks.0/*": "step",
        "transformer_blocks.1/*": "step",
    }

    summary = {key: value for update in parts(shown, "summary", "update") for key, value in update.items()}
    assert summary["score/psnr"] == 36.0
    assert summary["score/psnr_low"] == 35.44
    assert summary["score/checkpoint_bytes"] == 5_250_000
    assert "score/ssim" not in summary
    assert summary["transformer_blocks.0/block_error"] == 0.01
    assert summary["proj_out/sqnr_db"] == 25.5


def test_a_job_with_little_to_show_is_shown(composed: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = composed(*TOY, "targets=[capture]")
    view(tmp_path).show(config, plan(config), Store(tmp_path / "store"))
    assert not caplog.records
    assert records(tmp_path)


def test_an_account_that_does_not_work_harms_nothing(job, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    view(tmp_path, mode="online").show(*job)
    (record,) = caplog.records
    assert "results are in the store" in record.getMessage()


def test_the_option_makes_the_view(composed: Compose, tmp_path: Path):
    config = OmegaConf.to_container(composed("logger=wandb").logger, resolve=False)
    fixed = {"mode": "offline", "dir": "x", "group": None, "job_type": None, "name": ""}
    assert isinstance(instantiate({**config, **fixed}), WandbView)  # pyright: ignore
