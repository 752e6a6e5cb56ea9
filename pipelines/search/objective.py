"""Objectives of a search: the scores that a run returns, under the names of table columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from fp4dit.tables.rows import make_scored_row
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json
from pipelines.config.resolvers import find_unavailable_metrics, suggest_names
from pipelines.results.columns import ColumnCatalog
from pipelines.stages.scalars import STAGE_SCALARS

# Numbers of a result that are not metrics.
SCALARS = (*STAGE_SCALARS, "calibration_seconds", "n")

ObjectiveValue = float | list[float] | None

Direction = Literal["maximize", "minimize"]

DIRECTIONS: Mapping[str, Direction] = {"higher": "maximize", "lower": "minimize"}


def list_objectives(cfg: DictConfig) -> list[str]:
    """Return the names of a run's objectives; none by default."""
    return [cfg.objective] if isinstance(cfg.objective, str) else list(cfg.objective or [])


def check_objectives(cfg: DictConfig) -> None:
    """Check that the run will have a number for each of its objectives.

    Raises:
        UserError: if it will have none for one of them.
    """
    missing = find_unavailable_metrics(cfg.metrics)
    metrics = [str(name) for name in cfg.metrics if name not in missing]
    names = list_objectives(cfg)
    for name in names:
        metric = strip_metric_suffix(name)
        if metric not in metrics and metric not in SCALARS:
            reason = f" without its weights: {missing[metric]}" if metric in missing else ""
            raise UserError(
                f"objective={name}: this is not scored{reason}; "
                f"{suggest_names(metric, [*metrics, *SCALARS])}"
            )
    if names and "score" not in cfg.targets:
        raise UserError(
            f"objective={cfg.objective}: targets={cfg.targets} has no scores; add score"
        )


def read_objective(cfg: DictConfig, results: Mapping[str, Path]) -> ObjectiveValue:
    """Return the objective of a finished run: a number, or a list if `objective` is a list.

    Args:
        cfg: Config of the run.
        results: Folder of each stage.

    Raises:
        UserError: if there is no such number.
    """
    names = list_objectives(cfg)
    if not names:
        return None
    metrics = read_json(results["score"] / "metrics.json")
    numbers: dict[str, float] = {}
    for name, number in make_scored_row("", metrics).values.items():
        if number is not None:
            numbers[name] = float(number)
    for name in names:
        if name not in numbers:
            raise UserError(
                f"objective={name}: this has no number here; {suggest_names(name, list(numbers))}"
            )
    values = [numbers[name] for name in names]
    return values[0] if isinstance(cfg.objective, str) else values


def find_directions(names: Sequence[str], catalog: ColumnCatalog) -> list[Direction]:
    """Return `maximize` or `minimize` for each objective, from the columns of tables.

    Raises:
        UserError: if a column has no better direction.
    """
    directions = []
    for name in names:
        metric = strip_metric_suffix(name)
        better = catalog.find_column(metric).better if metric in catalog else None
        if better is None:
            example = ",".join("minimize" if other == name else "..." for other in names)
            raise UserError(
                f"{name} has no better direction: give hydra.sweeper.direction=[{example}], or "
                "maximize"
            )
        directions.append(DIRECTIONS[better])
    return directions


def strip_metric_suffix(name: str) -> str:
    """Return the metric of `hps_v2_1:anime` (a group of prompts) or `fid/coco` (a reference)."""
    return name.partition(":")[0].partition("/")[0]
