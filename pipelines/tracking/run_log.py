"""Contents of a W&B run: curves, layers, images, scores and references to files."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from fp4dit.store.store import Store
from fp4dit.tables.images import draw_difference
from fp4dit.tables.rows import ScoredRow, choose_order_column
from pipelines.planning.plan import PlannedStage
from pipelines.planning.plan_cache import RunPlan
from pipelines.results.columns import ColumnCatalog, load_catalog
from pipelines.results.rows import PlannedRun
from pipelines.results.stage_files import (
    read_loss_curve,
    read_optional_csv,
    read_optional_json,
)

# Columns of curve.csv and loss.csv.
CURVES = ("error", "rounding_loss", "loss")

Stages = Mapping[str, PlannedStage]

Folders = Mapping[str, Path]  # folders of the stages, by name


def log_curves(run: Any, folders: Folders) -> None:
    """Log the error and rounding loss of every block by step, and the loss of a training run.

    The steps of each block start at 0.
    """
    lines = []
    for folder in folders.values():
        lines += read_optional_csv(folder, "curve.csv")
    lines += read_loss_curve(folders.get("train") or folders.get("train_baseline"))
    run.define_metric("step", hidden=True)
    for unit in dict.fromkeys(line["unit"] for line in lines):
        run.define_metric(f"{unit}/*", step_metric="step")
    lines.sort(key=_line_step)
    for step, step_lines in groupby(lines, key=_line_step):
        values: dict[str, float] = {}
        for line in step_lines:
            for name in CURVES:
                if line.get(name):
                    values[f"{line['unit']}/{name}"] = float(line[name])
        run.log({"step": step, **values})


def _line_step(line: Mapping[str, str]) -> int:
    return int(line["step"])


def log_layers(run: Any, folders: Folders) -> None:
    """Log the error of each block, and the SQNR of activations by layer and timestep."""
    run.define_metric("block", hidden=True)
    run.define_metric("block_error", step_metric="block", summary="none")
    blocks = read_optional_json(folders.get("reconstruct"), "blocks.json") or []
    for number, block in enumerate(blocks):
        run.summary[f"{block['unit']}/block_error"] = block["error"]
        run.log({"block": number, "block_error": block["error"]})
    lines = read_optional_csv(folders.get("activate"), "sqnr.csv")
    if lines:
        log_sqnr(run, lines)


def log_sqnr(run: Any, lines: Sequence[Mapping[str, str]]) -> None:
    """Log the SQNR table, the mean of each layer, and mean and worst of each timestep."""
    import wandb

    rows: list[Any] = []
    for line in lines:
        rows.append([line["layer"], float(line["timestep"]), float(line["sqnr_db"])])
    run.log({"sqnr": wandb.Table(["layer", "timestep", "sqnr_db"], rows)})
    by_layer: dict[str, list[float]] = {}
    by_timestep: dict[float, list[float]] = {}
    for layer, timestep, decibels in rows:
        if isfinite(decibels):  # it is infinite if nothing is lost
            by_layer.setdefault(layer, []).append(decibels)
            by_timestep.setdefault(timestep, []).append(decibels)
    for layer in sorted(by_layer):
        run.summary[f"{layer}/sqnr_db"] = fmean(by_layer[layer])
    run.define_metric("timestep", hidden=True)
    run.define_metric("sqnr_db/*", step_metric="timestep", summary="mean")
    for timestep in sorted(by_timestep, reverse=True):
        values = by_timestep[timestep]
        run.log({"timestep": timestep, "sqnr_db/mean": fmean(values), "sqnr_db/worst": min(values)})


def log_images(run: Any, stages: Stages, folders: Folders, count: int) -> None:
    """Log a table of the worst images: the image, its reference, their difference, its scores."""
    import wandb

    needs = stages["score"].needs if "score" in stages else {}
    if "images" not in needs:
        return
    image_folder, reference_folder = folders[needs["images"]], folders[needs["reference"]]
    entries = read_optional_json(image_folder, "images.json") or []
    scores = read_optional_json(folders.get("score"), "metrics.json") or {}
    metrics = scores.get("per_image", {})
    catalog = load_catalog(stages["score"].config.get("metrics"))
    table = wandb.Table(["prompt", "seed", "image", "reference", "difference", *metrics])
    for i in order_by_worst(metrics, len(entries), catalog)[:count]:
        file = f"images/{i:05}.png"
        image, reference = image_folder / file, reference_folder / file
        both = image.is_file() and reference.is_file()
        table.add_data(
            entries[i]["prompt"],
            entries[i]["seed"],
            wandb.Image(str(image)) if image.is_file() else None,
            wandb.Image(str(reference)) if reference.is_file() else None,
            wandb.Image(draw_difference(image, reference)) if both else None,
            *(values[i] for values in metrics.values()),
        )
    run.log({"images": table})


def order_by_worst(
    metrics: Mapping[str, Sequence[float | None]], count: int, catalog: ColumnCatalog
) -> list[int]:
    """Return the numbers of the images, from the worst on by the metric `choose_order_column`.

    Without such a metric they keep their order.
    """
    column = choose_order_column([catalog.find_column(name) for name in metrics if name in catalog])
    if column is None:
        return list(range(count))
    sign, values = -1 if column.better == "lower" else 1, metrics[column.name]
    return sorted(range(count), key=lambda i: (values[i] is None, sign * (values[i] or 0)))


def log_artifact(run: Any, stages: Stages, folders: Folders) -> None:
    """Log an artifact with references to manifests, rounded weights and exported pipelines.

    Nothing is copied. Each file is read for its MD5, by which W&B notices that a file has changed.
    """
    import wandb

    finished = {}
    for name, folder in folders.items():
        if (folder / "manifest.json").is_file():
            finished[name] = folder
    if not finished:
        return
    last = "score" if "score" in finished else next(reversed(finished))
    keys = {name: stages[name].key for name in finished}
    artifact = wandb.Artifact(f"{last}-{keys[last]}", "results", metadata=keys)
    for name, folder in finished.items():
        for file in _list_referenced_files(folder):
            artifact.add_reference((folder / file).absolute().as_uri(), f"{name}/{file}")
    run.log_artifact(artifact)


def _list_referenced_files(folder: Path) -> Iterator[str]:
    yield "manifest.json"
    for file in read_optional_json(folder, "manifest.json")["files"]:
        if file.startswith(("units/", "pipeline/")):
            yield file


def log_score(run: Any, stages: Stages, store: Store) -> None:
    """Log the row of the table as the run's summary."""
    if "score" in stages:
        row = PlannedRun("", (), RunPlan(stages)).load_row(store, ScoredRow("", {}))
        values = {f"score/{name}": value for name, value in row.values.items() if value is not None}
        run.summary.update(values)
