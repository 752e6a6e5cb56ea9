"""Weights & Biases as a view of the store: written from the folders of a finished job, never read from.

It can be thrown away and drawn again, for a job that finds everything in the store shows the same.
"""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fp4dit.pictures import difference
from fp4dit.rows import Column, Row
from fp4dit.store import Store
from pipelines.plan import Step
from pipelines.plans import Plan
from pipelines.resolvers import CONF
from pipelines.rows import Entry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbView:
    """One run per job. `images` is how many are shown beside their references. A run that is given no `name` is called
    after what was chosen for it. A server that stops answering is waited for at most `patience` seconds."""

    project: str
    mode: str
    dir: str
    group: str | None
    job_type: str | None
    name: str
    images: int = 8
    patience: float = 300.0

    def show(self, cfg: DictConfig, steps: Mapping[str, Step], store: Store, chosen: Sequence[str] = ()) -> None:
        """Whatever goes wrong here is only told: the results are safe in the store."""
        try:
            self.draw(cfg, steps, store, self.name or named(chosen) or self.job_type)
        except Exception as error:
            log.warning(
                "W&B does not show all of this job: %r. Its results are in the store, and the same command shows them "
                "again",
                error,
            )

    def draw(self, cfg: DictConfig, steps: Mapping[str, Step], store: Store, name: str | None) -> None:
        # The pictures of an offline run are kept here until it is synced; by default that is the home directory.
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(variable, str(Path(self.dir).absolute() / "wandb"))
        import wandb  # here, for it takes half a second and a job without a logger does not need it

        logging.getLogger("wandb").setLevel(logging.CRITICAL)  # its errors come back as exceptions, told once
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
        folders = {step.name: store.path(step.name, step.key) for step in steps.values()}
        run = wandb.init(
            project=self.project,
            mode=self.mode,  # pyright: ignore[reportArgumentType]
            dir=self.dir,
            group=self.group,
            job_type=self.job_type,
            name=name,
            config={**config, "keys": {name: step.key for name, step in steps.items()}},
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=min(30.0, self.patience),
                finish_timeout=self.patience,  # by default the job would wait until the server is back
                finish_timeout_raises=True,
                x_disable_stats=True,
            ),
        )
        failed = 1
        try:
            draw_curves(run, folders)
            draw_layers(run, folders)
            draw_images(run, steps, folders, self.images)
            draw_score(run, steps, store)
            refer(run, steps, folders)
            failed = 0
        finally:
            run.finish(failed)  # `with run` would print a traceback


def named(chosen: Sequence[str]) -> str:
    """A short name of what was chosen: the option of a group alone, other values behind the last word of what they set,
    or all of it where two sets end alike."""
    pairs = [override.lstrip("+").partition("=") for override in chosen]
    last = lambda key: ("~" if key.startswith("~") else "") + key.lstrip("~").rpartition(".")[2]
    ends = Counter(last(key) for key, _, _ in pairs)
    parts = []
    for key, equals, value in pairs:
        if (CONF / key).is_dir():
            parts.append(value)
        else:
            parts.append(f"{last(key) if ends[last(key)] == 1 else key}{equals}{value.rpartition('/')[2]}")
    return shorten(" ".join(parts), 100, placeholder=" ...")


def draw_curves(run: Any, folders: Mapping[str, Path]) -> None:
    """Error and indecision of every block against the step of its own reconstruction, and of what is tuned later; the
    loss of what is trained anew."""
    lines = [line for folder in folders.values() for line in read_csv(folder, "curve.csv")]
    lines += read_losses(folders.get("trained") or folders.get("plain"))
    names = ("error", "indecision", "loss")
    run.define_metric("step", hidden=True)
    for unit in dict.fromkeys(line["unit"] for line in lines):
        run.define_metric(f"{unit}/*", step_metric="step")
    step = lambda line: int(line["step"])
    for at, group in groupby(sorted(lines, key=step), key=step):
        values = {}
        for line in group:
            values |= {f"{line['unit']}/{name}": float(v) for name in names if (v := line.get(name))}
        run.log({"step": at, **values})


def draw_layers(run: Any, folders: Mapping[str, Path]) -> None:
    """Each block's error, by its number; and by timestep the mean and the worst signal to noise over layers."""
    import wandb

    run.define_metric("block", hidden=True)
    run.define_metric("block_error", step_metric="block", summary="none")
    for number, block in enumerate(read_json(folders.get("reconstruct"), "blocks.json") or []):
        run.summary[f"{block['unit']}/block_error"] = block["error"]
        run.log({"block": number, "block_error": block["error"]})
    lines = read_csv(folders.get("activate"), "sqnr.csv")
    if lines:
        rows = [[line["layer"], float(line["timestep"]), float(line["sqnr_db"])] for line in lines]
        run.log({"sqnr": wandb.Table(["layer", "timestep", "sqnr_db"], rows)})
        finite = [row for row in rows if isfinite(row[2])]  # infinite where nothing is lost
        for layer, group in groupby(sorted(finite), key=lambda r: r[0]):
            run.summary[f"{layer}/sqnr_db"] = fmean(r[2] for r in group)
        run.define_metric("timestep", hidden=True)
        run.define_metric("sqnr_db/*", step_metric="timestep", summary="mean")
        for timestep, group in groupby(sorted(finite, key=lambda r: -r[1]), key=lambda r: r[1]):
            values = [value for _, _, value in group]
            run.log({"timestep": timestep, "sqnr_db/mean": fmean(values), "sqnr_db/worst": min(values)})


def draw_images(run: Any, steps: Mapping[str, Step], folders: Mapping[str, Path], count: int) -> None:
    """A table of the worst images beside their references and what differs, with all that each is scored by."""
    import wandb

    needs = steps["score"].needs if "score" in steps else {}
    if "images" not in needs:
        return
    made, reference = folders[needs["images"]], folders[needs["reference"]]
    drawn = read_json(made, "images.json") or []
    metrics = (read_json(folders.get("score"), "metrics.json") or {}).get("per_image", {})
    table = wandb.Table(["prompt", "seed", "image", "reference", "difference", *metrics])
    for i in worst(metrics, len(drawn))[:count]:
        own, other = pair = [folder / "images" / f"{i:05}.png" for folder in (made, reference)]
        shown = [wandb.Image(str(path)) if path.is_file() else None for path in pair]
        apart = wandb.Image(difference(own, other)) if None not in shown else None
        table.add_data(drawn[i]["prompt"], drawn[i]["seed"], *shown, apart, *(values[i] for values in metrics.values()))
    run.log({"images": table})


def worst(metrics: Mapping[str, Sequence[float | None]], count: int) -> list[int]:
    """The images from the worst on: by the first metric that compares them with their references, or else the first.

    As they were drawn, if there is none.
    """
    if not metrics:
        return list(range(count))
    known = columns()
    name = next((name for name in metrics if name in known and known[name].compares), next(iter(metrics)))
    sign = -1 if name in known and known[name].better == "lower" else 1
    values = metrics[name]
    return sorted(range(count), key=lambda i: (values[i] is None, sign * (values[i] or 0)))


def columns() -> dict[str, Column]:
    """Of all tables."""
    node: Any = OmegaConf.load(CONF / "tables.yaml")
    return {name: Column(name, **given) for name, given in {**node.columns, **node.others}.items()}


def refer(run: Any, steps: Mapping[str, Step], folders: Mapping[str, Path]) -> None:
    """An artifact that says where everything lies: the manifest of each stage, hard weights, and what was exported.

    Nothing is copied, but each of these files is read for its MD5, without which W&B could not tell that it has changed
    and would hand out none.
    """
    import wandb

    there = {name: folder for name, folder in folders.items() if (folder / "manifest.json").is_file()}
    if not there:
        return
    named_after = "score" if "score" in there else next(reversed(there))
    keys = {name: steps[name].key for name in there}
    artifact = wandb.Artifact(f"{named_after}-{keys[named_after]}", "results", metadata=keys)
    for name, folder in there.items():
        made = read_json(folder, "manifest.json")["files"]
        for file in ["manifest.json", *(file for file in made if file.startswith(("units/", "pipeline/")))]:
            artifact.add_reference((folder / file).absolute().as_uri(), f"{name}/{file}")
    run.log_artifact(artifact)


def draw_score(run: Any, steps: Mapping[str, Step], store: Store) -> None:
    """The row of the table."""
    if "score" in steps:
        values = Entry("", (), Plan(steps)).row(store, Row("", {})).values
        run.summary.update({f"score/{name}": value for name, value in values.items() if value is not None})


def read_json(folder: Path | None, name: str) -> Any:
    return json.loads((folder / name).read_text()) if folder and (folder / name).is_file() else None


def read_losses(folder: Path | None) -> list[dict[str, str]]:
    return [{"unit": "training", "step": line["batch"], "loss": line["loss"]} for line in read_csv(folder, "loss.csv")]


def read_csv(folder: Path | None, name: str) -> list[dict[str, str]]:
    if not folder or not (folder / name).is_file():
        return []
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))
