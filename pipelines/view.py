"""Weights & Biases as a view of the store: written from the folders of a finished job, never read from.

It can be thrown away and drawn again, for a job that finds everything in the store shows the same.
"""

import csv
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fp4dit.rows import row
from fp4dit.store import Store
from pipelines.plan import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbView:
    """One run per job. `images` is how many are shown beside their references."""

    project: str
    mode: str
    dir: str
    group: str | None
    job_type: str | None
    name: str
    images: int = 8

    def show(self, cfg: DictConfig, steps: Mapping[str, Step], store: Store) -> None:
        """Whatever goes wrong here is only told: the results are safe in the store."""
        try:
            self.draw(cfg, steps, store)
        except Exception as error:
            log.warning("W&B shows nothing of this job: %r. Its results are in the store.", error)

    def draw(self, cfg: DictConfig, steps: Mapping[str, Step], store: Store) -> None:
        # The pictures of an offline run are kept here until it is synced; by default that is the home directory.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str(Path(self.dir).absolute() / "wandb"))
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
            name=self.name or self.job_type,
            config={**config, "keys": {name: step.key for name, step in steps.items()}},
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True),
        )
        with run:
            draw_curves(run, folders)
            draw_layers(run, folders)
            draw_images(run, steps, folders, self.images)
            draw_score(run, folders)


def draw_curves(run: Any, folders: Mapping[str, Path]) -> None:
    """Error and indecision of every block against the step of its own reconstruction."""
    lines = read_csv(folders.get("reconstruct"), "curve.csv")
    run.define_metric("step", hidden=True)
    for unit in dict.fromkeys(line["unit"] for line in lines):
        run.define_metric(f"{unit}/*", step_metric="step")
    step = lambda line: int(line["step"])
    for at, group in groupby(sorted(lines, key=step), key=step):
        values = {}
        for line in group:
            values |= {f"{line['unit']}/{name}": float(v) for name in ("error", "indecision") if (v := line[name])}
        run.log({"step": at, **values})


def draw_layers(run: Any, folders: Mapping[str, Path]) -> None:
    import wandb

    for block in read_json(folders.get("reconstruct"), "blocks.json") or []:
        run.summary[f"{block['unit']}/block_error"] = block["error"]
    lines = read_csv(folders.get("activate"), "sqnr.csv")
    if lines:
        rows = [[line["layer"], float(line["timestep"]), float(line["sqnr_db"])] for line in lines]
        run.log({"sqnr": wandb.Table(["layer", "timestep", "sqnr_db"], rows)})
        for layer, group in groupby(sorted(rows), key=lambda r: r[0]):
            values = [r[2] for r in group]
            run.summary[f"{layer}/sqnr_db"] = sum(values) / len(values)


def draw_images(run: Any, steps: Mapping[str, Step], folders: Mapping[str, Path], count: int) -> None:
    import wandb

    needs = steps["score"].needs if "score" in steps else {}
    if "images" not in needs:
        return
    made, reference = folders[needs["images"]], folders[needs["reference"]]
    table = wandb.Table(["prompt", "image", "reference"])
    for i, entry in enumerate((read_json(made, "images.json") or [])[:count]):
        pair = [folder / "images" / f"{i:05}.png" for folder in (made, reference)]
        table.add_data(entry["prompt"], *(wandb.Image(str(path)) if path.is_file() else None for path in pair))
    run.log({"images": table})


def draw_score(run: Any, folders: Mapping[str, Path]) -> None:
    metrics = read_json(folders.get("score"), "metrics.json")
    if metrics:
        values = row("", metrics).values
        run.summary.update({f"score/{name}": value for name, value in values.items() if value is not None})


def read_json(folder: Path | None, name: str) -> Any:
    return json.loads((folder / name).read_text()) if folder and (folder / name).is_file() else None


def read_csv(folder: Path | None, name: str) -> list[dict[str, str]]:
    if not folder or not (folder / name).is_file():
        return []
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))
