"""The goal of a search, and its results: the scores of the trials, and the best ones."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from fp4dit.utils.errors import UserError
from pipelines.results.columns import load_catalog
from pipelines.search import objective

log = logging.getLogger(__name__)

Goal = Mapping[str, objective.Direction]  # by the name of the objective


def parse_goal(cfg: DictConfig, direction: Any) -> Goal:
    """Return the objectives of a search and their directions.

    Args:
        cfg: Config of a trial.
        direction: hydra.sweeper.direction: null, a direction, or one for each objective.

    Raises:
        UserError: if there is no objective, or it is not scored, or a direction is missing.
    """
    objective.check_objectives(cfg)
    names = objective.list_objectives(cfg)
    if not names:
        raise UserError("a search needs an objective: give objective=psnr, or another metric")
    if direction is None:
        directions = objective.find_directions(names, load_catalog(cfg.metrics))
        return dict(zip(names, directions, strict=True))
    directions = list(direction) if OmegaConf.is_list(direction) else [direction]
    if len(directions) != len(names) or not {"maximize", "minimize"}.issuperset(directions):
        raise UserError(
            f"hydra.sweeper.direction={direction}: give maximize or minimize for each of {names}"
        )
    return dict(zip(names, directions, strict=True))


def record_trial(study: Study, number: int, job: JobReturn, goal: Goal) -> None:
    """Add the result of a job to the study, and log it."""
    if job.status == JobStatus.FAILED:
        study.tell(number, state=TrialState.FAIL)
        log.warning("trial %d failed: %s", number, describe_failure(job))
        return
    value = job.return_value
    study.tell(number, value)
    log.info("trial %d: %s", number, format_scores(study.trials[number].values, goal))


def describe_failure(job: JobReturn) -> str:
    """Return the error of a job that failed."""
    error = job._return_value
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def format_scores(values: Sequence[float], goal: Goal) -> str:
    """Return the objectives and their values."""
    return ", ".join(f"{name} {value:.6g}" for name, value in zip(goal, values, strict=True))


def find_best_trials(study: Study) -> list[FrozenTrial]:
    """Return the best trial, or the Pareto front of several objectives, each combination once."""
    trials = study.best_trials if len(study.directions) > 1 else [study.best_trial]
    # In reverse order, so that the first trial of each combination replaces the later ones.
    trial_by_params = {tuple(trial.params.items()): trial for trial in reversed(trials)}
    return sorted(trial_by_params.values(), key=lambda trial: trial.number)


def log_results(study: Study, goal: Goal) -> None:
    """Log the best trials and the number of failed ones."""
    for trial in find_best_trials(study):
        params = " ".join(f"{key}={value}" for key, value in trial.params.items())
        scores = format_scores(trial.values, goal)
        log.info("best: %s by trial %d: %s", scores, trial.number, params)
    failed = [str(trial.number) for trial in study.trials if trial.state == TrialState.FAIL]
    if failed:
        numbers = ", ".join(failed)
        log.warning("%d of %d trials failed: %s", len(failed), len(study.trials), numbers)


def save_results(study: Study, jobs: Sequence[JobReturn], goal: Goal, folder: Path) -> None:
    """Write the best trials and all trials to optimization_results.yaml.

    The fields of the best trials have the names that hydra-optuna-sweeper uses.
    """
    results: dict[str, Any] = {"name": "optuna", "objective": dict(goal)}
    if any(job.status == JobStatus.COMPLETED for job in jobs):
        best = find_best_trials(study)
        if len(goal) > 1:
            results["solutions"] = [
                {"params": trial.params, "values": trial.values} for trial in best
            ]
        else:
            results |= {"best_params": best[0].params, "best_value": best[0].value}
    results["trials"] = []
    for trial, job in zip(study.trials, jobs, strict=True):
        outcome = {"values": trial.values} if trial.values else {"failed": describe_failure(job)}
        results["trials"].append({"params": trial.params} | outcome)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "optimization_results.yaml").write_text(yaml.safe_dump(results, sort_keys=False))
