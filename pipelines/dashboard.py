"""Make a workspace in W&B for what `pipelines.view` logs."""

from collections.abc import Iterable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from fp4dit.errors import UserError
from fp4dit.rows import Column, Row, expanded
from pipelines.command import command
from pipelines.resolvers import CONF
from pipelines.view import columns

COSTS = ("bits_weight", "bits_activation", "checkpoint_bytes")
ATTRIBUTES = ("Group", "JobType", "Name")  # of a run, as W&B calls them, by which runs can be put together
SEND = "those that were made offline are sent by: wandb sync outputs/wandb/offline-run-*"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="dashboard")
def main(cfg: DictConfig) -> None:
    unknown = [name for name in cfg.group_by if name not in ATTRIBUTES]
    if unknown:
        raise UserError(f"group_by={unknown[0]}: choose among {', '.join(ATTRIBUTES)}")
    try:
        import wandb
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed: pip install 'fp4dit[dashboards]'") from error
    if cfg.dry_run:
        print(workspace(cfg, cfg.entity or "nobody", [])._to_model().model_dump_json(by_alias=True, indent=1))
        return
    try:
        api = wandb.Api(timeout=30)
        entity = cfg.entity or api.default_entity or ""
        where = {"group": cfg.group} if cfg.group else {}
        runs = logged(api.runs(f"{entity}/{cfg.project}", filters=where, lazy=False))
        made = workspace(cfg, entity, runs).save() if runs else None
    except Exception as error:
        raise UserError(
            f"W&B made no workspace: {error} It needs a login (wandb login) and a project {cfg.project!r} with runs; "
            f"{SEND}"
        ) from error
    if made is None:
        raise UserError(f"no run of {entity}/{cfg.project}{f' is in group {cfg.group!r}' if cfg.group else ''}; {SEND}")
    print(made.url)


def logged(runs: Iterable[Any]) -> list[Row]:
    """The row of the table that each run has as its summary."""
    prefix = "score/"
    return [
        Row(run.name, {key.removeprefix(prefix): v for key, v in run.summary_metrics.items() if key.startswith(prefix)})
        for run in runs
    ]


def shown(names: Iterable[str], runs: Sequence[Row]) -> list[Column]:
    """A column for each number of these names that a run has, or for each of the names if no runs are known."""
    known = columns()
    found = expanded([known.get(name, Column(name, name)) for name in names], runs)
    return [c for c in found if not runs or any(run.values.get(c.name) is not None for run in runs)]


def workspace(cfg: DictConfig, entity: str, runs: Sequence[Row]) -> Any:
    """Scores, what they cost, where errors arise, images; the columns of the table of runs are those of the papers."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    scores, costs = shown(cfg.metrics, runs), shown(COSTS, runs)
    filters = [expr.Metric("Group") == cfg.group] if cfg.group else []
    table = ws.RunsetSettings(
        filters=filters,
        groupby=[expr.Metric(name) for name in cfg.group_by],
        order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
        pinned_columns=["run:displayName", *(f"summary:score/{c.name}" for c in [*scores, *costs])],
    )
    settings = ws.WorkspaceSettings(max_runs=40, sort_panels_alphabetically=False)
    own = sections(scores, costs)
    return ws.Workspace(entity, cfg.project, cfg.name, sections=own, settings=settings, runset_settings=table)


def sections(scores: Sequence[Column], costs: Sequence[Column]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    summary = lambda column: wr.SummaryMetric(f"score/{column.name}")
    against = lambda column, cost: wr.ScatterPlot(
        title=f"{title(column)} by {title(cost)}",
        x=summary(cost),
        y=summary(column),
        legend_template="${run:displayName}",
    )
    bars = lambda column: wr.BarPlot(title=title(column), metrics=[f"score/{column.name}"], max_bars_to_show=40)
    line = lambda title, x, **given: wr.LinePlot(title=title, x=x, title_x=x, max_runs_to_show=40, **given)
    panels = {
        "Images": [wr.WeavePanelSummaryTable(table_name="images")],
        "Scores": [bars(column) for column in scores],
        "Quality against cost": [against(column, cost) for column in scores for cost in costs],
        "Where errors arise": [
            line("Error of blocks", "block", y=["block_error"], log_y=True),
            line("Signal to noise of activations, mean of layers, dB", "timestep", y=["sqnr_db/mean"]),
            line("Signal to noise of activations, worst layer, dB", "timestep", y=["sqnr_db/worst"]),
        ],
        "Learning": [
            line("Error of each block", "step", metric_regex=".*/error$", log_y=True),
            line("Indecision of each block", "step", metric_regex=".*/indecision$"),
        ],
    }
    return [ws.Section(name, panels=own, is_open=True) for name, own in panels.items()]


def title(column: Column) -> str:
    """Of the plain number, which is what W&B draws: titles of tables say in what unit a factor puts it."""
    return column.title if column.factor == 1 else column.name.replace("_", " ")


if __name__ == "__main__":
    command(main)()
