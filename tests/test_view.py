"""What W&B is shown is read back from the file that an offline run leaves."""

import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import pipelines.dashboard
import pipelines.table
from fp4dit.rows import row
from fp4dit.store import Store
from pipelines.dashboard import logged, workspace
from pipelines.plan import execute, plan
from pipelines.runtime import Runtime
from pipelines.view import WandbView, draw_curves, named, worst
from tests.conftest import ROOT, TOY, Compose, Run


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


def test_the_losses_of_a_training_are_a_curve(tmp_path: Path):
    (tmp_path / "loss.csv").write_text("batch,seconds,loss\n20,9.5,1.25\n40,19.0,0.75\n")
    logged = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append)
    draw_curves(run, {"plain": tmp_path / "nowhere", "trained": tmp_path})
    assert logged == [{"step": 20, "training/loss": 1.25}, {"step": 40, "training/loss": 0.75}]


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
    assert (images["images.nrows"], images["images.ncols"]) == (4, 6)
    assert [(line["block"], line["block_error"]) for line in history if "block" in line] == [(0, 0.01), (1, 0.01)]
    decibels = [
        (line["timestep"], line["sqnr_db/mean"], line["sqnr_db/worst"]) for line in history if "timestep" in line
    ]
    assert decibels == [(999, 30.5, 30.5), (1, 20.5, 20.5)]
    assert any("sqnr.nrows" in line for line in history)
    metrics = [record["metric"] for record in shown if record["type"] == "metric"]
    assert {m["glob_name"]: m["step_metric"] for m in metrics if "glob_name" in m} == {
        "transformer_blocks.0/*": "step",
        "transformer_blocks.1/*": "step",
        "sqnr_db/*": "timestep",
    }

    summary = {key: value for update in parts(shown, "summary", "update") for key, value in update.items()}
    assert summary["score/psnr"] == 36.0
    assert summary["score/psnr_low"] == 35.44
    assert summary["score/checkpoint_bytes"] == 5_250_000
    assert "score/ssim" not in summary
    assert summary["transformer_blocks.0/block_error"] == 0.01
    assert summary["proj_out/sqnr_db"] == 25.5


def test_what_is_shown_is_what_the_store_holds(shown: list[dict[str, Any]], job):
    _, steps, store = job
    folder = {name: store.path(name, step.key) for name, step in steps.items()}
    history = parts(shown, "history", "item")
    logged = {
        (key.removesuffix("/error"), line["step"]): (value, line[key.replace("error", "indecision")])
        for line in history
        for key, value in line.items()
        if key.endswith("/error")
    }
    with open(folder["reconstruct"] / "curve.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert logged == {(p["unit"], int(p["step"])): (float(p["error"]), float(p["indecision"])) for p in lines}
    summary = {key: value for update in parts(shown, "summary", "update") for key, value in update.items()}
    given = row("", json.loads((folder["score"] / "metrics.json").read_text())).values
    scores = {key.removeprefix("score/"): value for key, value in summary.items() if key.startswith("score/")}
    assert scores == {name: value for name, value in given.items() if value is not None}
    (run,) = (record["run"] for record in shown if record["type"] == "run")
    composed = OmegaConf.to_container(job[0], resolve=True)
    config = {key: value for key, value in run["config"]["update"].items() if key not in ("keys", "_wandb")}
    assert config == json.loads(json.dumps(composed))


def test_the_summary_is_the_row_of_the_table(shown: list[dict[str, Any]], run: Run, tmp_path: Path):
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "toy.yaml").write_text(
        "# @package _global_\npicture_prompts: 1\nrows: [{label: One, overrides: [stages=toy]}]\n"
    )
    place = f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"
    assert run("table=toy", place, main=pipelines.table.main) == 0
    with open(tmp_path / "tables" / "toy.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    summary = {key: value for update in parts(shown, "summary", "update") for key, value in update.items()}
    cells = {name: float(cell) for name, cell in line.items() if cell and name != "label"}
    assert len(cells) >= 11
    assert cells == {name: summary[f"score/{name}"] for name in cells}


def test_an_artifact_says_where_all_of_it_lies_and_holds_none_of_it(shown: list[dict[str, Any]], job):
    _, steps, store = job
    (artifact,) = (r["artifact"] for r in shown if r["type"] == "artifact" and r["artifact"]["type"] == "results")
    assert artifact["name"] == f"score-{steps['score'].key}"
    assert json.loads(artifact["metadata"]) == {name: step.key for name, step in steps.items()}
    contents = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    weights = {f"reconstruct/units/transformer_blocks.{i}.safetensors" for i in (0, 1)}
    assert contents.keys() == {f"{name}/manifest.json" for name in steps} | weights
    for name, entry in contents.items():
        stage, _, file = name.partition("/")
        path = store.path(stage, steps[stage].key) / file
        assert entry["ref"] == path.absolute().as_uri()
        assert base64.b64decode(entry["digest"]) == hashlib.md5(path.read_bytes()).digest()


def test_a_job_that_is_all_in_the_store_is_shown_the_same_again(shown: list[dict[str, Any]], job, tmp_path: Path):
    config, steps, store = job
    execute(steps, ["score"], store, Runtime())
    (tmp_path / "again").mkdir()
    view(tmp_path, dir=str(tmp_path / "again")).show(config, steps, store)
    aside = re.compile(r"_runtime|_timestamp|_wandb.*|.*artifact_path")  # times, and the run's own name
    plain = lambda line: {k: v for k, v in line.items() if not aside.fullmatch(k)}
    for kind, part in (("history", "item"), ("summary", "update")):
        first, second = ([plain(line) for line in parts(r, kind, part)] for r in (shown, records(tmp_path / "again")))
        assert [line for line in first if line] == [line for line in second if line]


def asked(spec: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The keys and the patterns of keys that the panels of a workspace, and its columns, show of a run."""
    section = spec["spec"]["section"]
    panels = [panel["config"] for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    pinned = [name for name in section["runSets"][0]["runFeed"]["columnPinned"] if name != "run:displayName"]
    own = {name.removeprefix("summary:") for name in pinned} | {key for config in panels for key in keys(config)}
    return own, {pattern for config in panels if (pattern := config.get("metricRegex"))}


def test_the_dashboard_asks_for_what_was_logged(shown: list[dict[str, Any]], run: Run, capfd):
    assert run("dry_run=true", "metrics=psnr", main=pipelines.dashboard.main, outputs=False) == 0
    own, patterns = asked(json.loads(capfd.readouterr().out))
    there = {key for part in ("history", "summary") for line in parts(shown, part, PART[part]) for key in line}
    there |= {key.removesuffix(".nrows") for key in there}  # of a table
    assert own >= {"block_error", "sqnr_db/mean", "score/psnr", "score/bits_weight", "images"}
    assert own <= there
    assert len(patterns) == 2
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in there)


def test_a_dashboard_of_known_runs_has_no_empty_chart(shown: list[dict[str, Any]]):
    summary = {key: value for update in parts(shown, "summary", "update") for key, value in update.items()}
    of_set = {f"score/fid/coco-5000/tf-bilinear{end}": 7.0 for end in ("", "_low", "_high")}
    runs = [SimpleNamespace(name="a", summary_metrics=summary), SimpleNamespace(name="b", summary_metrics=of_set)]
    cfg = {"metrics": dict.fromkeys(["psnr", "ssim", "clip", "fid"]), "group": "demo", "group_by": ["JobType"]}
    made = workspace(OmegaConf.create({**cfg, "project": "p", "name": "n"}), "me", logged(runs))._to_model()
    spec = made.model_dump(by_alias=True)
    own, _ = asked(spec)
    scores = {"psnr", "fid/coco-5000/tf-bilinear", "bits_weight", "bits_activation", "checkpoint_bytes"}
    assert {key for key in own if key.startswith("score/")} == {f"score/{name}" for name in scores}
    (table,) = spec["spec"]["section"]["runSets"]
    assert table["grouping"] == [{"section": "run", "name": "jobType"}]
    assert [(f["key"]["name"], f["value"]) for f in table["filters"]["filters"]] == [("group", "demo")]


def test_what_runs_are_grouped_by_is_an_attribute_of_theirs(run: Run, capfd):
    assert run("dry_run=true", "group_by=[method]", main=pipelines.dashboard.main, outputs=False) == 1
    assert "choose among Group, JobType, Name" in capfd.readouterr().err


PART = {"history": "item", "summary": "update"}


def keys(config: dict[str, Any]) -> set[str]:
    """What a panel shows of a run."""
    plain = [*config.get("metrics", []), *(config.get(axis) for axis in ("xAxis", "yAxis"))]
    tables = re.findall(r'"type": "string", "val": "(images)"', json.dumps(config))
    return {key.removeprefix("summary:") for key in [*plain, *tables] if key}


def test_without_a_login_the_dashboard_says_what_to_do(
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


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        (["experiment=demo_4_fp4dit_w4a8"], "demo_4_fp4dit_w4a8"),
        (["method=gptq", "rounding.steps=100", "+generation.seed=3"], "gptq steps=100 seed=3"),
        (["prompts/calibration=coco_train2014", "seed=2", "joint=null"], "coco_train2014 seed=2 joint=null"),
        (["rounding.steps=100", "generation.steps=20"], "rounding.steps=100 generation.steps=20"),
        (["model.path=/a/folder/of/PixArt", "~metrics.lpips"], "path=PixArt ~lpips"),
        ([], ""),
    ],
)
def test_a_run_is_called_after_what_was_chosen(chosen: list[str], name: str):
    assert named(chosen) == name


def test_worst_images_come_first():
    assert worst({"psnr": [30.0, None, 20.0, 40.0]}, 4) == [2, 0, 3, 1]
    assert worst({"lpips": [0.3, 0.1, 0.9]}, 3) == [2, 0, 1]
    assert worst({"clip": [1.0, 2.0, 3.0], "lpips": [0.3, 0.1, 0.9]}, 3) == [2, 0, 1]  # CLIP looks at no reference
    assert worst({"oracle": [1.0, 0.0, 1.0]}, 3) == [1, 0, 2]
    assert worst({}, 3) == [0, 1, 2]


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
    view(tmp_path, mode="online", patience=3.0).show(*job)
    (record,) = caplog.records
    assert "results are in the store" in record.getMessage()


class Silent(BaseHTTPRequestHandler):
    """A W&B server that takes one run, and nothing of what is in it."""

    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"]))) if self.path == "/graphql" else {}
        answer: dict[str, Any] = {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}"}}
        answer |= {"serverInfo": {"features": []}}
        query = body.get("query", "")
        refused = self.server.taken and not query.strip().startswith("query")
        if not refused and "upsertBucket" in query:
            self.server.taken = True
            project = {"id": "p", "name": "fp4dit", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": body["variables"]["name"], "displayName": "x", "config": "{}"}
            answer = {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        text = b"" if refused else json.dumps({"data": answer}).encode()
        self.send_response(404 if "otel" in self.path else 503 if refused else 200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None: ...


class Server(ThreadingHTTPServer):
    taken = False


@pytest.fixture
def silent() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Silent)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_that_falls_silent_is_not_waited_for(silent: Server, tmp_path: Path):
    """In a process of its own, for W&B reads where its server is but once."""
    url = f"http://127.0.0.1:{silent.server_port}"
    given = ["logger=wandb", "logger.patience=1", f"outputs={tmp_path}"]
    command = lambda mode: subprocess.run(
        [sys.executable, "-m", "pipelines.run", *TOY, *given, f"logger.mode={mode}"],
        env={**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "WANDB_CONFIG_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    done = command("online")
    assert silent.taken
    assert done.returncode == 0
    assert "W&B does not show all of this job: TimeoutError" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("store/score/*/metrics.json"))
    assert command("offline").returncode == 0
    told = [update for part in parts(records(tmp_path), "summary", "update") for update in part]
    assert "score/" in json.dumps(told)  # all of it, from the store


def test_the_option_makes_the_view(composed: Compose, tmp_path: Path):
    config = OmegaConf.to_container(composed("logger=wandb").logger, resolve=False)
    fixed = {"mode": "offline", "dir": "x", "group": None, "job_type": None, "name": ""}
    assert isinstance(instantiate({**config, **fixed}), WandbView)  # pyright: ignore
