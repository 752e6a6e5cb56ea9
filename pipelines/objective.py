"""What a run returns to a search: scores by the names that tables have for them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError
from fp4dit.rows import row
from pipelines.resolvers import CONF, absent, nearest

# What the score stage copies from those before it, and what it counts itself.
BITS = ("bits_weight", "bits_activation", "bit_operations", "checkpoint_bytes")
COSTS = (*BITS, "block_error", "steps", "loss", "step_seconds")
COUNTED = (*COSTS, "calibration_seconds", "n")
Value = float | list[float] | None
Direction = Literal["maximize", "minimize"]
DIRECTIONS: Mapping[str, Direction] = {"higher": "maximize", "lower": "minimize"}


def named(cfg: DictConfig) -> list[str]:
    """The objectives of a run; none by default."""
    return [cfg.objective] if isinstance(cfg.objective, str) else list(cfg.objective or [])


def check(cfg: DictConfig) -> None:
    """Raises UserError if an objective is none of the scores that this run will have."""
    lacking = absent(cfg.metrics)
    scored = [str(name) for name in cfg.metrics if name not in lacking]
    for name in named(cfg):
        metric = measured(name)
        if metric not in scored and metric not in COUNTED:
            why = f" for lack of weights: {lacking[metric]}" if metric in lacking else ""
            raise UserError(f"objective={name}: this is not scored{why}; {nearest(metric, [*scored, *COUNTED])}")
    if named(cfg) and "score" not in cfg.targets:
        raise UserError(f"objective={cfg.objective}: targets={cfg.targets} has no scores; add score")


def value(cfg: DictConfig, found: Mapping[str, Path]) -> Value:
    """The means in the folder of the score stage: a number, or a list where a list is asked for."""
    names = named(cfg)
    if not names:
        return None
    scored = row("", json.loads((found["score"] / "metrics.json").read_text())).values
    numbers = {name: number for name, number in scored.items() if number is not None}
    for name in names:
        if name not in numbers:
            raise UserError(f"objective={name}: this has no number here; {nearest(name, list(numbers))}")
    values = [float(numbers[name]) for name in names]
    return values[0] if isinstance(cfg.objective, str) else values


def directions(names: Sequence[str]) -> list[Direction]:
    """For each whether tables take more of it for better, `maximize`, or less, `minimize`.

    Raises:
        UserError: if they take neither.
    """
    tables = OmegaConf.load(CONF / "tables.yaml")
    columns = {**tables.others, **tables.columns}
    found = []
    for name in names:
        better = columns.get(measured(name), {}).get("better")
        if better is None:
            given = ",".join("minimize" if other == name else "..." for other in names)
            raise UserError(f"which {name} is better? Say so: hydra.sweeper.direction=[{given}], or maximize")
        found.append(DIRECTIONS[better])
    return found


def measured(name: str) -> str:
    """The metric without a style of prompts, as in hps_v2_1:anime, or what a set is compared with, as in fid/coco."""
    return name.partition(":")[0].partition("/")[0]
