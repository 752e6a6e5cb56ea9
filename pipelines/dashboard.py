"""Make a workspace in W&B for what `pipelines.view` logs."""

from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError
from pipelines.command import command
from pipelines.resolvers import CONF

COSTS = ("bits_weight", "bits_activation", "checkpoint_bytes")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="dashboard")
def main(cfg: DictConfig) -> None:
    try:
        import wandb
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed: pip install 'fp4dit[dashboards]'") from error
    if cfg.dry_run:
        print(workspace(cfg, cfg.entity or "nobody")._to_model().model_dump_json(by_alias=True, indent=1))
        return
    try:
        print(workspace(cfg, cfg.entity or wandb.Api(timeout=30).default_entity or "").save().url)
    except Exception as error:
        raise UserError(
            f"W&B made no workspace: {error} It needs a login (wandb login) and a project {cfg.project!r} with runs; "
            "those that were made offline are sent by: wandb sync outputs/wandb/offline-run-*"
        ) from error


def workspace(cfg: DictConfig, entity: str) -> Any:
    """Scores, what they cost, where errors arise, images; the columns of the table of runs are those of the papers."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    columns: Any = OmegaConf.load(CONF / "tables.yaml")
    titles = {name: column.title for name, column in {**columns.others, **columns.columns}.items()}
    scores = [name for name in cfg.metrics if name in titles]
    pinned = ["run:displayName", *(f"summary:score/{name}" for name in [*scores, *COSTS])]
    filters = [expr.Metric("Group") == cfg.group] if cfg.group else []
    runs = ws.RunsetSettings(filters=filters, pinned_columns=pinned)
    settings = ws.WorkspaceSettings(max_runs=40, sort_panels_alphabetically=False)
    return ws.Workspace(
        entity, cfg.project, cfg.name, sections=sections(scores, titles), settings=settings, runset_settings=runs
    )


def sections(scores: Sequence[str], titles: dict[str, str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    summary = lambda name: wr.SummaryMetric(f"score/{name}")
    against = lambda name, cost: wr.ScatterPlot(
        title=f"{titles[name]} by {titles[cost]}",
        x=summary(cost),
        y=summary(name),
        legend_template="${run:displayName}",
    )
    line = lambda title, x, **given: wr.LinePlot(title=title, x=x, title_x=x, max_runs_to_show=40, **given)
    panels = {
        "Images": [wr.WeavePanelSummaryTable(table_name="images")],
        "Scores": [wr.BarPlot(title=titles[name], metrics=[f"score/{name}"], max_bars_to_show=40) for name in scores],
        "Quality against cost": [against(name, cost) for name in scores for cost in COSTS],
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


if __name__ == "__main__":
    command(main)()
