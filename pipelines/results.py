"""What a search goes by, and what it found."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from fp4dit.errors import UserError
from pipelines import objective

log = logging.getLogger(__name__)
Goal = Mapping[str, objective.Direction]  # by the name of a score


def goal(cfg: DictConfig, direction: Any) -> Goal:
    """Raises UserError if there is none, or it is not for what is scored."""
    objective.check(cfg)
    names = objective.named(cfg)
    if not names:
        raise UserError("a search goes by a score: give objective=psnr, or another of the metrics")
    if direction is None:
        return dict(zip(names, objective.directions(names), strict=True))
    given = list(direction) if OmegaConf.is_list(direction) else [direction]
    if len(given) != len(names) or not {"maximize", "minimize"}.issuperset(given):
        raise UserError(f"hydra.sweeper.direction={direction}: maximize or minimize is wanted, for each of {names}")
    return dict(zip(names, given, strict=True))


def tell(study: Study, number: int, job: JobReturn, goal: Goal) -> None:
    if job.status == JobStatus.FAILED:
        study.tell(number, state=TrialState.FAIL)
        log.warning("trial %d failed: %s", number, why(job))
        return
    value = job.return_value
    study.tell(number, value)
    log.info("trial %d: %s", number, numbers(study.trials[number].values, goal))


def why(job: JobReturn) -> str:
    error = job._return_value
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def numbers(values: Sequence[float], goal: Goal) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in zip(goal, values, strict=True))


def best(study: Study) -> list[FrozenTrial]:
    """The one with the best score, or those that no other beats in all of several, each combination once."""
    found = study.best_trials if len(study.directions) > 1 else [study.best_trial]
    first = {tuple(trial.params.items()): trial for trial in reversed(found)}
    return sorted(first.values(), key=lambda trial: trial.number)


def show(study: Study, goal: Goal) -> None:
    for trial in best(study):
        given = " ".join(f"{key}={value}" for key, value in trial.params.items())
        log.info("best: %s by trial %d: %s", numbers(trial.values, goal), trial.number, given)
    failed = [trial.number for trial in study.trials if trial.state == TrialState.FAIL]
    if failed:
        log.warning("%d of %d trials failed: %s", len(failed), len(study.trials), ", ".join(map(str, failed)))


def save(study: Study, done: Sequence[JobReturn], goal: Goal, folder: Path) -> None:
    """optimization_results.yaml, with the names that hydra-optuna-sweeper has in it, and all trials."""
    found: dict[str, Any] = {"name": "optuna", "objective": dict(goal)}
    if any(job.status == JobStatus.COMPLETED for job in done):
        ends = best(study)
        if len(goal) > 1:
            found["solutions"] = [{"params": trial.params, "values": trial.values} for trial in ends]
        else:
            found |= {"best_params": ends[0].params, "best_value": ends[0].value}
    found["trials"] = [
        {"params": trial.params} | ({"values": trial.values} if trial.values else {"failed": why(job)})
        for trial, job in zip(study.trials, done, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "optimization_results.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
