"""W&B runs: names, contents, and equality with the store."""

import base64
import csv
import hashlib
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import pipelines.dashboard
import pipelines.table
from fp4dit.store.store import Store
from fp4dit.tables.rows import make_scored_row
from pipelines.planning.executor import execute_plan
from pipelines.planning.plan import make_plan
from pipelines.results.columns import load_catalog
from pipelines.runtime.trainer import Runtime
from pipelines.tracking.run_log import log_curves, order_by_worst
from pipelines.tracking.wandb import WandbView, make_run_name
from tests.conftest import ROOT, TOY, Compose, Run
from tests.pipelines.tracking.records import (
    FIELDS,
    Records,
    find_run,
    make_view,
    merge_summary,
    read_records,
    select_records,
)


def test_training_losses_are_a_curve(tmp_path: Path):
    (tmp_path / "loss.csv").write_text("batch,seconds,loss\n20,9.5,1.25\n40,19.0,0.75\n")
    logged = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append)
    log_curves(run, {"train_baseline": tmp_path / "nowhere", "train": tmp_path})
    assert logged == [{"step": 20, "training/loss": 1.25}, {"step": 40, "training/loss": 0.75}]


def test_a_run_shows_the_whole_job(records: Records, job, tmp_path: Path):
    _, stages, _ = job
    run = find_run(records)
    assert [run[key] for key in ("project", "run_group", "job_type", "display_name")] == [
        *("fp4dit", "demo", "fp4dit", "a=1")
    ]
    config = run["config"]["update"]
    assert config["keys"] == {name: stage.key for name, stage in stages.items()}
    assert config["generation"]["steps"] == 20
    assert "${" not in json.dumps(config)

    history = select_records(records, "history")
    curve = [
        (line["step"], line["transformer_blocks.1/error"]) for line in history if "step" in line
    ]
    assert curve == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    (images,) = (line for line in history if "images.nrows" in line)
    assert (images["images.nrows"], images["images.ncols"]) == (4, 6)
    assert [(line["block"], line["block_error"]) for line in history if "block" in line] == [
        (0, 0.01),
        (1, 0.01),
    ]
    decibels = [
        (line["timestep"], line["sqnr_db/mean"], line["sqnr_db/worst"])
        for line in history
        if "timestep" in line
    ]
    assert decibels == [(999, 30.5, 30.5), (1, 20.5, 20.5)]
    assert any("sqnr.nrows" in line for line in history)
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert {m["glob_name"]: m["step_metric"] for m in metrics if "glob_name" in m} == {
        "transformer_blocks.0/*": "step",
        "transformer_blocks.1/*": "step",
        "sqnr_db/*": "timestep",
    }

    summary = merge_summary(records)
    assert summary["score/psnr"] == 36.0
    assert summary["score/psnr_low"] == 35.44
    assert summary["score/checkpoint_bytes"] == 5_250_000
    assert "score/ssim" not in summary
    assert summary["transformer_blocks.0/block_error"] == 0.01
    assert summary["proj_out/sqnr_db"] == 25.5


def test_a_run_shows_the_numbers_of_the_store(records: Records, job):
    _, stages, store = job
    folder = {name: store.get_path(name, stage.key) for name, stage in stages.items()}
    history = select_records(records, "history")
    logged = {
        (key.removesuffix("/error"), line["step"]): (
            value,
            line[key.replace("error", "rounding_loss")],
        )
        for line in history
        for key, value in line.items()
        if key.endswith("/error")
    }
    with open(folder["reconstruct"] / "curve.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert logged == {
        (p["unit"], int(p["step"])): (float(p["error"]), float(p["rounding_loss"])) for p in lines
    }
    summary = merge_summary(records)
    row = make_scored_row("", json.loads((folder["score"] / "metrics.json").read_text())).values
    scores = {
        key.removeprefix("score/"): value
        for key, value in summary.items()
        if key.startswith("score/")
    }
    assert scores == {name: value for name, value in row.items() if value is not None}
    run = find_run(records)
    composed = OmegaConf.to_container(job[0], resolve=True)
    config = {
        key: value
        for key, value in run["config"]["update"].items()
        if key not in ("keys", "_wandb")
    }
    assert config == json.loads(json.dumps(composed))


def test_the_summary_is_the_row_of_the_table(records: Records, run: Run, tmp_path: Path):
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "toy.yaml").write_text(
        "# @package _global_\npicture: {images: 1}\nrows: [{label: One, overrides: [stages=toy]}]\n"
    )
    place = f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"
    assert run("table=toy", place, main=pipelines.table.main) == 0
    with open(tmp_path / "tables" / "toy.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    summary = merge_summary(records)
    cells = {name: float(cell) for name, cell in line.items() if cell and name != "label"}
    assert len(cells) >= 11
    assert cells == {name: summary[f"score/{name}"] for name in cells}


def test_the_artifact_holds_references_only(records: Records, job):
    """An artifact refers to files by path and checksum, and contains none."""
    _, stages, store = job
    (artifact,) = (
        r["artifact"]
        for r in records
        if r["type"] == "artifact" and r["artifact"]["type"] == "results"
    )
    assert artifact["name"] == f"score-{stages['score'].key}"
    assert json.loads(artifact["metadata"]) == {name: stage.key for name, stage in stages.items()}
    contents = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    weights = {f"reconstruct/units/transformer_blocks.{i}.safetensors" for i in (0, 1)}
    assert contents.keys() == {f"{name}/manifest.json" for name in stages} | weights
    for name, entry in contents.items():
        stage, _, file = name.partition("/")
        path = store.get_path(stage, stages[stage].key) / file
        assert entry["ref"] == path.absolute().as_uri()
        assert base64.b64decode(entry["digest"]) == hashlib.md5(path.read_bytes()).digest()


def test_a_job_from_the_store_is_shown_the_same_again(records: Records, job, tmp_path: Path):
    config, stages, store = job
    execute_plan(stages, ["score"], store, Runtime())
    (tmp_path / "again").mkdir()
    make_view(tmp_path, dir=str(tmp_path / "again")).show(config, stages, store)
    repeated = read_records(tmp_path / "again")
    for kind in FIELDS:
        assert list_values(repeated, kind) == list_values(records, kind)


def list_values(records: Records, kind: str) -> Records:
    """Return the records of a kind without times and without the name of the run."""
    excluded = re.compile(r"_runtime|_timestamp|_wandb.*|.*artifact_path")
    values = []
    for record in select_records(records, kind):
        items = {key: value for key, value in record.items() if not excluded.fullmatch(key)}
        if items:
            values.append(items)
    return values


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["experiment=demo_4_fp4dit_w4a8"], "demo_4_fp4dit_w4a8"),
        (["method=gptq", "rounding.steps=100", "+generation.seed=3"], "gptq steps=100 seed=3"),
        (
            ["prompts/calibration=coco_train2014", "seed=2", "quantize_inputs_while_rounding=null"],
            "coco_train2014 seed=2 quantize_inputs_while_rounding=null",
        ),
        (["rounding.steps=100", "generation.steps=20"], "rounding.steps=100 generation.steps=20"),
        (["model.path=/a/folder/of/PixArt", "~metrics.lpips"], "path=PixArt ~lpips"),
        ([], ""),
    ],
)
def test_a_run_is_named_after_its_overrides(overrides: list[str], name: str):
    assert make_run_name(overrides) == name


def test_worst_images_come_first():
    worst = partial(order_by_worst, catalog=load_catalog())
    assert worst({"psnr": [30.0, None, 20.0, 40.0]}, 4) == [2, 0, 3, 1]
    assert worst({"lpips": [0.3, 0.1, 0.9]}, 3) == [2, 0, 1]
    without_reference = {"clip": [1.0, 2.0, 3.0]}
    assert worst({**without_reference, "lpips": [0.3, 0.1, 0.9]}, 3) == [2, 0, 1]
    assert worst({"oracle": [1.0, 0.0, 1.0]}, 3) == [1, 0, 2]
    assert worst({}, 3) == [0, 1, 2]


def test_a_job_with_little_to_show_is_shown(
    composed: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = composed(*TOY, "targets=[capture]")
    make_view(tmp_path).show(config, make_plan(config), Store(tmp_path / "store"))
    assert not caplog.records
    assert read_records(tmp_path)


def test_the_option_makes_the_view(composed: Compose, tmp_path: Path):
    config = OmegaConf.to_container(composed("logger=wandb").logger, resolve=False)
    fixed = {"mode": "offline", "dir": "x", "group": None, "job_type": None, "name": ""}
    assert isinstance(instantiate({**config, **fixed}), WandbView)  # pyright: ignore
