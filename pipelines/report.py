"""Write a table as one HTML page, from the results in the store."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fp4dit.report.images import ImageLimits, ReportImages
from fp4dit.report.page import render_page
from fp4dit.report.row_data import RowData, StageStatus
from fp4dit.store.store import Store
from fp4dit.tables.rows import TableColumn, choose_order_column
from fp4dit.tables.table import Table
from fp4dit.utils.files import atomic_write, read_json
from fp4dit.utils.formatting import format_bytes
from fp4dit.utils.provenance import read_git_commit, read_package_versions
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF
from pipelines.planning.plan import PlannedStage
from pipelines.results.columns import COST_COLUMNS, load_catalog
from pipelines.results.describe import StageDescriber
from pipelines.results.missing import exit_if_failed, format_command, run_jobs
from pipelines.results.rows import PlannedRun, TableRow, plan_table_rows
from pipelines.results.stage_files import (
    read_loss_curve,
    read_optional_csv,
    read_optional_json,
)
from pipelines.table import build_table, cli_overrides, select_table_columns

# The files of a stage that the page needs. It needs all files of a stage that is not listed.
FILES_READ = {
    "reconstruct": ("curve.csv", "blocks.json"),
    "activate": ("sqnr.csv",),
    "histograms": ("histograms.json",),
    "train": ("loss.csv",),
    "train_baseline": ("loss.csv",),
}
# The page reads nothing of these stages, so that it does not matter if their results are missing.
STAGES_NOT_SHOWN = ("capture", "export")
# No score needs this stage, so that a run does not make it.
ON_REQUEST = "histograms"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def main(cfg: DictConfig) -> None:
    """Write the page to `outputs/reports`."""
    store, name = Store(Path(cfg.outputs) / "store"), HydraConfig.get().runtime.choices["table"]
    limits = ImageLimits(**cfg.report)
    rows = plan_table_rows(cfg, name)
    columns = select_table_columns(cfg, name, rows)
    incomplete = plan_incomplete_runs(rows, store)
    failed = []
    if cfg.run_missing:
        runs = [run for run in incomplete if run]
        failed = run_jobs(runs, cfg.jobs, Path(cfg.outputs) / "runs")
        incomplete = plan_incomplete_runs(rows, store)
    table = build_table(cfg, rows, columns, store)
    describer = StageDescriber(store)
    row_data = []
    for row, run in zip(rows, incomplete, strict=True):
        row_data.append(collect_row_data(row, run, store, describer))
    num_incomplete = sum(run is not None for run in incomplete)
    fill_command = ""
    if num_incomplete:
        fill_command = format_command("report", *cli_overrides(), "run_missing=true", "jobs=2")
    out = Path(cfg.outputs) / "reports" / f"{name}.html"
    with atomic_write(out) as part, open(part, "w", encoding="utf-8") as file:
        images = ReportImages(row_data, limits, **choose_order_metric(table))
        costs, origin = make_cost_columns(cfg), describe_origin(store, rows)
        file.writelines(render_page(name, table, row_data, images, costs, fill_command, origin))
    print(f"{out} ({format_bytes(out.stat().st_size)})")
    if num_incomplete:
        print(f"{describe_incomplete(rows, num_incomplete, store)}\n  {fill_command}")
    exit_if_failed(failed, len(rows))


def plan_incomplete_runs(rows: Sequence[TableRow], store: Store) -> list[PlannedRun | None]:
    """Return for each row the run that makes what the page lacks of it, or None."""
    return [plan_missing_stages(row.first_run, store) for row in rows]


def describe_incomplete(rows: Sequence[TableRow], num_incomplete: int, store: Store) -> str:
    """Return what the page does not show.

    Args:
        rows: All rows.
        num_incomplete: The number of rows of which something is not shown.
        store: The store.
    """
    missing = [list_missing_stages(row.first_run, store) for row in rows]
    num_histograms = missing.count([ON_REQUEST])
    if num_incomplete > num_histograms:
        num_results = num_incomplete - num_histograms
        return f"The page lacks results of {num_results} of {len(rows)} rows. To make them:"
    return (
        f"The page is complete but for histograms of the values in {num_histograms} of "
        f"{len(rows)} rows, which are made on request:"
    )


def displayed_stages(run: PlannedRun) -> list[PlannedStage]:
    """Return the stages of which the page shows something."""
    return [stage for stage in run.stages.values() if stage.name not in STAGES_NOT_SHOWN]


def plan_missing_stages(run: PlannedRun, store: Store) -> PlannedRun | None:
    """Return the run that makes the missing stages, or None if no stage is missing."""
    missing = list_missing_stages(run, store)
    if run.stages and not missing:
        return None
    targets = [f"targets=[{','.join(missing)}]"] if missing else []
    return replace(run, overrides=[*run.overrides, *targets])


def list_missing_stages(run: PlannedRun, store: Store) -> list[str]:
    """Return the names of the displayed stages that are not in the store."""
    return [stage.name for stage in displayed_stages(run) if find_stage(stage, store) is None]


def find_stage(step: PlannedStage, store: Store) -> Path | None:
    """Return the folder of a stage if the files that the page reads are intact."""
    default = ("manifest.json",) if step.name in STAGES_NOT_SHOWN else ()
    return store.find_entry(step.name, step.key, *FILES_READ.get(step.name, default))


def collect_row_data(
    row: TableRow, missing: PlannedRun | None, store: Store, describer: StageDescriber
) -> RowData:
    """Read what the page shows of a row.

    Args:
        row: The row.
        missing: The run that makes what is missing, or None if nothing is.
        store: The store.
        describer: The describer of the stages of the store.
    """
    run = row.first_run
    folders = {name: find_stage(stage, store) for name, stage in run.stages.items()}
    stages = []
    for name, stage in run.stages.items():
        state = describer.describe_state(stage, folders[name] is not None)
        stages.append(StageStatus(name, stage.key, state))
    return RowData(
        scored=run.load_row(store, row.empty_row),
        command=format_command("run", *run.overrides),
        config=OmegaConf.to_yaml({name: dict(stage.config) for name, stage in run.stages.items()}),
        stages=stages,
        fill_command=format_command("run", *missing.overrides) if missing else "",
        problem=run.plan.problem,
        images=run.find_role("images", store),
        reference=run.find_role("reference", store),
        sqnr=read_optional_csv(folders.get("activate"), "sqnr.csv"),
        curve=read_curve(folders),
        blocks=read_optional_json(folders.get("reconstruct"), "blocks.json") or (),
        histograms=read_optional_json(folders.get("histograms"), "histograms.json"),
    )


def read_curve(folders: Mapping[str, Path | None]) -> list[dict[str, str]]:
    """Read the errors while rounding is learned, or the losses of a training run."""
    if errors := read_optional_csv(folders.get("reconstruct"), "curve.csv"):
        return errors
    losses = read_loss_curve(folders.get("train" if "train" in folders else "train_baseline"))
    return [{**line, "error": line["loss"]} for line in losses]


def choose_order_metric(table: Table) -> dict[str, Any]:
    """Return the column that chooses the worst images, as arguments of `ReportImages`.

    It is chosen from the columns of the table. The result is empty if none of them is suitable.
    """
    column = choose_order_column(table.columns)
    if column is None:
        return {}
    return {"worst_by": column.name, "higher_is_better": column.better == "higher"}


def make_cost_columns(cfg: DictConfig) -> dict[str, TableColumn]:
    """Return the columns against which quality is plotted."""
    catalog = load_catalog(numbers=cfg.columns)
    return {name: catalog.find_column(name) for name in COST_COLUMNS if name in catalog}


def describe_origin(store: Store, rows: Sequence[TableRow]) -> str:
    """Return when the rows were scored, and by which code the page is written."""
    days = []
    for row in rows:
        for run in row.runs.values():
            if folder := run.find_result("score", store):
                manifest = read_json(folder / "manifest.json")
                days.append(manifest["created"][:10])
    scored = ""
    if days:
        first, last = min(days), max(days)
        scored = f"Scored {first}{f' to {last}' if last != first else ''}. "
    code = f"{read_package_versions().get('fp4dit', '')}, {read_git_commit() or 'no commit known'}"
    return f"{scored}Page by FP4DiT {code}."


if __name__ == "__main__":
    run_command(main)
