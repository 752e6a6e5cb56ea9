"""Make a workspace in W&B that shows the runs which `pipelines.tracking` writes."""

from collections.abc import Iterable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from fp4dit.tables.rows import ScoredRow, TableColumn, expand_columns
from fp4dit.utils.errors import UserError
from fp4dit.utils.extras import require_extra
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF
from pipelines.results.columns import COST_COLUMNS, load_catalog

# Attributes of a run by which runs can be grouped, as W&B calls them.
ATTRIBUTES = ("Group", "JobType", "Name")
SYNC_ADVICE = "to send runs that were made offline: wandb sync outputs/wandb/offline-run-*"
# `pipelines.tracking.run_log.log_score` puts this before the names of numbers in a run's summary.
SUMMARY_PREFIX = "score/"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="dashboard")
def main(cfg: DictConfig) -> None:
    unknown = [name for name in cfg.group_by if name not in ATTRIBUTES]
    if unknown:
        raise UserError(f"group_by={unknown[0]}: choose among {', '.join(ATTRIBUTES)}")
    require_extra("dashboards", "this command")
    if cfg.dry_run:
        model = build_workspace(cfg, cfg.entity or "nobody", [])._to_model()
        print(model.model_dump_json(by_alias=True, indent=1))
    else:
        print(save_workspace(cfg))


def save_workspace(cfg: DictConfig) -> str:
    """Save the workspace in W&B, and return its address.

    Raises:
        UserError: if W&B refuses, or there is no run to show.
    """
    import wandb

    try:
        api = wandb.Api(timeout=30)
        entity = cfg.entity or api.default_entity or ""
        filters = {"group": cfg.group} if cfg.group else {}
        runs = read_runs(api.runs(f"{entity}/{cfg.project}", filters=filters, lazy=False))
        workspace = build_workspace(cfg, entity, runs).save() if runs else None
    except Exception as error:
        raise UserError(
            f"W&B made no workspace: {error} It needs a login (wandb login) and a project "
            f"{cfg.project!r} with runs; {SYNC_ADVICE}"
        ) from error
    if workspace is None:
        in_group = f" is in group {cfg.group!r}" if cfg.group else ""
        raise UserError(f"no run of {entity}/{cfg.project}{in_group}; {SYNC_ADVICE}")
    return workspace.url


def read_runs(runs: Iterable[Any]) -> list[ScoredRow]:
    """Return the table row that is the summary of each run."""
    rows = []
    for run in runs:
        values = {}
        for key, value in run.summary_metrics.items():
            if key.startswith(SUMMARY_PREFIX):
                values[key.removeprefix(SUMMARY_PREFIX)] = value
        rows.append(ScoredRow(run.name, values))
    return rows


def columns_with_values(
    names: Iterable[str], metrics: Any, runs: Sequence[ScoredRow]
) -> list[TableColumn]:
    """Return the columns of these names for which some run has a value.

    If no runs are known, all columns are returned.
    """
    catalog = load_catalog(metrics)
    columns = []
    for name in names:
        columns.append(catalog.find_column(name) if name in catalog else TableColumn(name, name))
    with_values = []
    for column in expand_columns(columns, runs):
        if not runs or any(run.values.get(column.name) is not None for run in runs):
            with_values.append(column)
    return with_values


def build_workspace(cfg: DictConfig, entity: str, runs: Sequence[ScoredRow]) -> Any:
    """Return a workspace of charts, and of a table of runs with their scores and costs."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    metrics = cfg.metrics
    scores = columns_with_values(metrics, metrics, runs)
    costs = columns_with_values(COST_COLUMNS, metrics, runs)
    filters = [expr.Metric("Group") == cfg.group] if cfg.group else []
    pinned = [f"summary:{SUMMARY_PREFIX}{column.name}" for column in [*scores, *costs]]
    runset_settings = ws.RunsetSettings(
        filters=filters,
        groupby=[expr.Metric(name) for name in cfg.group_by],
        order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
        pinned_columns=["run:displayName", *pinned],
    )
    return ws.Workspace(
        entity,
        cfg.project,
        cfg.name,
        sections=build_sections(scores, costs),
        settings=ws.WorkspaceSettings(max_runs=40, sort_panels_alphabetically=False),
        runset_settings=runset_settings,
    )


def build_sections(scores: Sequence[TableColumn], costs: Sequence[TableColumn]) -> list[Any]:
    """Return the sections: images, scores, quality against cost, errors, learning curves."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    bars = []
    for column in scores:
        bars.append(
            wr.BarPlot(
                title=plot_title(column),
                metrics=[f"{SUMMARY_PREFIX}{column.name}"],
                max_bars_to_show=40,
            )
        )
    scatter_plots = []
    for column in scores:
        for cost in costs:
            scatter_plots.append(
                wr.ScatterPlot(
                    title=f"{plot_title(column)} by {plot_title(cost)}",
                    x=wr.SummaryMetric(f"{SUMMARY_PREFIX}{cost.name}"),
                    y=wr.SummaryMetric(f"{SUMMARY_PREFIX}{column.name}"),
                    legend_template="${run:displayName}",
                )
            )
    panels = {
        "Images": [wr.WeavePanelSummaryTable(table_name="images")],
        "Scores": bars,
        "Quality against cost": scatter_plots,
        "Where errors arise": [
            _line_plot("Error of blocks", "block", y=["block_error"], log_y=True),
            _line_plot("SQNR of activations, mean of layers, dB", "timestep", y=["sqnr_db/mean"]),
            _line_plot("SQNR of activations, worst layer, dB", "timestep", y=["sqnr_db/worst"]),
        ],
        "Learning": [
            _line_plot("Error of each block", "step", metric_regex=".*/error$", log_y=True),
            _line_plot("Rounding loss of each block", "step", metric_regex=".*/rounding_loss$"),
        ],
    }
    return [ws.Section(name, panels=charts, is_open=True) for name, charts in panels.items()]


def _line_plot(title: str, x: str, **options: Any) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=x, title_x=x, max_runs_to_show=40, **options)


def plot_title(column: TableColumn) -> str:
    """Return the title of the stored number, which W&B plots.

    The title of a table's column names the unit that its factor converts to.
    """
    return column.title if column.factor == 1 else column.name.replace("_", " ")


if __name__ == "__main__":
    run_command(main)
