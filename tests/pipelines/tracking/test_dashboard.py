"""Workspaces of W&B: charts of the keys that runs have."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import pipelines.dashboard
from pipelines.dashboard import build_workspace, read_runs
from tests.conftest import Run
from tests.pipelines.tracking.records import FIELDS, Records, merge_summary, select_records


def find_shown_keys(spec: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Return the keys, and patterns of keys, that a workspace shows of a run."""
    section = spec["spec"]["section"]
    panels = [
        panel["config"]
        for part in section["panelBankConfig"]["sections"]
        for panel in part["panels"]
    ]
    pinned = [
        name
        for name in section["runSets"][0]["runFeed"]["columnPinned"]
        if name != "run:displayName"
    ]
    shown_keys = {name.removeprefix("summary:") for name in pinned}
    for config in panels:
        shown_keys |= list_panel_keys(config)
    return shown_keys, {pattern for config in panels if (pattern := config.get("metricRegex"))}


def test_the_dashboard_shows_keys_that_are_logged(records: Records, run: Run, capfd):
    assert run("dry_run=true", "metrics=psnr", main=pipelines.dashboard.main, outputs=False) == 0
    shown_keys, patterns = find_shown_keys(json.loads(capfd.readouterr().out))
    logged = set()
    for kind in FIELDS:
        for record in select_records(records, kind):
            logged |= record.keys()
    logged |= {key.removesuffix(".nrows") for key in logged}  # keys of tables
    assert shown_keys >= {
        "block_error",
        "sqnr_db/mean",
        "score/psnr",
        "score/bits_weight",
        "images",
    }
    assert shown_keys <= logged
    assert len(patterns) == 2
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in logged)


def test_a_dashboard_of_known_runs_has_no_empty_chart(records: Records):
    summary = merge_summary(records)
    set_scores = {f"score/fid/coco-5000/tf-bilinear{end}": 7.0 for end in ("", "_low", "_high")}
    runs = [
        SimpleNamespace(name="a", summary_metrics=summary),
        SimpleNamespace(name="b", summary_metrics=set_scores),
    ]
    cfg = {
        "metrics": {"psnr": {}, "ssim": {}, "clip": {}, "fid": {}},
        "group": "demo",
        "group_by": ["JobType"],
    }
    workspace = build_workspace(
        OmegaConf.create({**cfg, "project": "p", "name": "n"}), "me", read_runs(runs)
    )._to_model()
    spec = workspace.model_dump(by_alias=True)
    shown_keys, _ = find_shown_keys(spec)
    scores = {
        "psnr",
        "fid/coco-5000/tf-bilinear",
        "bits_weight",
        "bits_activation",
        "checkpoint_bytes",
        "calibration_seconds",
        "bit_operations",
    }
    assert {key for key in shown_keys if key.startswith("score/")} == {
        f"score/{name}" for name in scores
    }
    (table,) = spec["spec"]["section"]["runSets"]
    assert table["grouping"] == [{"section": "run", "name": "jobType"}]
    assert [(f["key"]["name"], f["value"]) for f in table["filters"]["filters"]] == [
        ("group", "demo")
    ]


def test_runs_are_grouped_by_their_attributes_only(run: Run, capfd):
    assert (
        run("dry_run=true", "group_by=[method]", main=pipelines.dashboard.main, outputs=False) == 1
    )
    assert "choose among Group, JobType, Name" in capfd.readouterr().err


def list_panel_keys(config: dict[str, Any]) -> set[str]:
    """Return the keys of a run that a panel shows."""
    plain = [*config.get("metrics", []), *(config.get(axis) for axis in ("xAxis", "yAxis"))]
    tables = re.findall(r'"type": "string", "val": "(images)"', json.dumps(config))
    return {key.removeprefix("summary:") for key in [*plain, *tables] if key}


def test_without_a_login_the_dashboard_explains_itself(
    run: Run, capfd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert run("entity=me", main=pipelines.dashboard.main, outputs=False) == 1
    error = capfd.readouterr().err
    assert "error: W&B made no workspace" in error
    assert "wandb sync outputs/wandb/offline-run-*" in error
    assert "Traceback" not in error
