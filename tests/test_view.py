"""What W&B is shown is read back from the file that an offline run leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from fp4dit.store import Store
from pipelines.plan import execute, plan
from pipelines.runtime import Runtime
from pipelines.view import WandbView
from tests.conftest import TOY, Compose


def records(root: Path) -> list[Record]:
    (file,) = root.glob("wandb/offline-run-*/*.wandb")
    data = DataStore()
    data.open_for_scan(str(file))
    found = []
    while (block := data.scan_data()) is not None:
        record = Record()
        record.ParseFromString(block)
        found.append(record)
    return found


def decoded(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


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
def shown(job, tmp_path: Path) -> list[Record]:
    view(tmp_path).show(*job)
    return records(tmp_path)


def test_a_run_shows_the_whole_job(shown: list[Record], job, tmp_path: Path):
    _, steps, _ = job
    run = next(r.run for r in shown if r.HasField("run"))
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("fp4dit", "demo", "fp4dit", "a=1")
    config = decoded(run.config.update)
    assert config["keys"] == {name: step.key for name, step in steps.items()}
    assert config["generation"]["steps"] == 20
    assert "${" not in json.dumps(config)

    history = [decoded(r.history.item) for r in shown if r.HasField("history")]
    curve = [(line["step"], line["transformer_blocks.1/error"]) for line in history if "step" in line]
    assert curve == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    (images,) = (line["images"] for line in history if "images" in line)
    assert (images["nrows"], images["ncols"]) == (4, 3)
    assert any("sqnr" in line for line in history)

    metrics = {m.name or m.glob_name: m.step_metric for r in shown if (m := r.metric).ByteSize()}
    assert metrics["transformer_blocks.0/*"] == "step"

    summary: dict[str, Any] = {}
    for record in shown:
        summary |= decoded(record.summary.update)
    assert summary["score/psnr"] == 36.0
    assert summary["score/psnr_low"] == 35.44
    assert summary["score/checkpoint_bytes"] == 5_250_000
    assert "score/ssim" not in summary
    assert summary["transformer_blocks.0/block_error"] == 0.01
    assert summary["proj_out/sqnr_db"] == 25.5


def test_the_images_are_in_the_run(shown: list[Record], tmp_path: Path):
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) >= 4


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
