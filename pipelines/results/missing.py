"""Runs whose results are not in the store: commands that make them, time estimates, and jobs."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from fp4dit.utils.formatting import format_duration
from pipelines.planning.executor import list_pending_stages
from pipelines.planning.plan import PlannedStage
from pipelines.results.rows import PlannedRun

# A copy made before `run_command` sets HYDRA_FULL_ERROR, so that jobs also print short errors.
ENVIRONMENT = dict(os.environ)


def format_command(module: str, *arguments: str) -> str:
    """Return the shell command that runs one of our commands."""
    return shlex.join(["python", "-m", f"pipelines.{module}", *arguments])


def describe_missing(
    missing: Sequence[PlannedRun],
    stored: Sequence[PlannedRun],
    table_overrides: Sequence[str],
    store: Store,
) -> Iterator[str]:
    """Yield how to make each missing run and all of them, and how long that may take.

    Args:
        missing: Runs that are not in the store.
        stored: Runs of the table that are, from which the times are estimated.
        table_overrides: Overrides of the command that prints the table.
        store: The store.
    """
    stages = (stage for run in stored for stage in run.stages.values())
    measured = MeasuredTimes(stages, store)
    estimates = [measured.estimate_run(run) for run in missing]
    for run, estimate in zip(missing, estimates, strict=True):
        command = format_command("run", *run.overrides)
        yield f"missing: {run.name} ({format_estimate(estimate)}). To make it:\n  {command}"
    for problem in dict.fromkeys(run.plan.problem for run in missing if run.plan.problem):
        yield f"before that: {problem}"
    total: dict[str, float | None] = {}
    for estimate in estimates:
        total |= estimate
    planned = all(estimates)  # a run that cannot be planned has an empty estimate
    if None in total.values() or not planned:
        yield (
            "Times are estimated from similar stages in the store; where there are none, "
            "pipelines.inspect computes rough ones from the same overrides."
        )
    if len(missing) > 1:
        command = format_command("table", *table_overrides, "run_missing=true", "jobs=2")
        time = format_estimate(total if planned else {})
        yield f"To make them all ({time} on one job):\n  {command}"


def format_estimate(seconds_by_stage: Mapping[str, float | None]) -> str:
    """Return the sum of the estimates, if there is one for each stage."""
    known = [seconds for seconds in seconds_by_stage.values() if seconds is not None]
    if not known or len(known) < len(seconds_by_stage):
        return "time not estimated"
    return f"about {format_duration(sum(known))}"


class MeasuredTimes:
    """Times that stages in the store took, as estimates of stages that are missing.

    Args:
        stages: Stages that may be in the store.
        store: The store.

    Example:
        >>> times = MeasuredTimes(stored_run.stages.values(), store)
        >>> seconds_by_stage = times.estimate_run(missing_run)
    """

    def __init__(self, stages: Iterable[PlannedStage], store: Store) -> None:
        self.store = store
        self.measured: list[tuple[PlannedStage, float]] = []
        for stage in {stage.key: stage for stage in stages}.values():
            seconds = store.read_seconds(stage.name, stage.key)
            if seconds is not None:
                self.measured.append((stage, seconds))

    def estimate_run(self, run: PlannedRun) -> dict[str, float | None]:
        """Return the seconds of each stage that has to run, by key; None if unknown."""
        if not run.stages:
            return {}
        pending = list_pending_stages(run.stages, ["score"], self.store)
        return {stage.key: self.estimate_stage(stage) for stage in pending}

    def estimate_stage(self, stage: PlannedStage) -> float | None:
        """Return the median time of comparable stages, in proportion to their work."""
        estimates = []
        for other, seconds in self.measured:
            if have_comparable_times(stage, other):
                estimates.append(seconds * count_work(stage) / count_work(other))
        return median(estimates) if estimates else None


def have_comparable_times(stage: PlannedStage, other: PlannedStage) -> bool:
    """Return whether two stages agree in name, model and rounding method."""
    return _timing_class(stage) == _timing_class(other)


def _timing_class(stage: PlannedStage) -> tuple[Any, ...]:
    rounding = stage.config.get("rounding", {}).get("_target_")
    return stage.name, stage.config.get("model"), rounding


def count_work(stage: PlannedStage) -> float:
    """Return the number to which a stage's time is proportional.

    It is the number of learning steps, of sampler steps over all images, or of transformer calls.
    """
    config: Mapping[str, Any] = stage.config
    if learning_steps := config.get("rounding", {}).get("steps"):
        return learning_steps
    generation, calibration = config.get("generation"), config.get("calibration")
    if generation and "count" in config:
        return config["count"] * generation["steps"]
    if isinstance(calibration, dict):
        prompts = calibration["num_prompts"] + calibration["num_val_prompts"]
        return prompts * calibration["steps"]
    return 1


def run_jobs(runs: Sequence[PlannedRun], jobs: int, logs: Path) -> list[str]:
    """Run `jobs` runs at a time, and return the names of those that failed.

    A run that fails does not stop the others.

    Raises:
        UserError: if `jobs` is less than 1.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs}: at least one job has to run")
    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(partial(run_job, logs=logs), runs))
    return [run.name for run, success in zip(runs, succeeded, strict=True) if not success]


def exit_if_failed(failed: Sequence[str], num_rows: int) -> None:
    """End the program with an error if there are rows that failed."""
    if failed:
        sys.exit(
            f"error: {len(failed)} of {num_rows} rows failed: {'; '.join(failed)}. See the log "
            "above for the errors."
        )


def run_job(run: PlannedRun, logs: Path) -> bool:
    """Run a job and print its output with the run's name. Return whether it succeeded."""
    arguments = [sys.executable, "-m", "pipelines.run", *run.overrides]
    if run.stages:
        # Jobs that start within the same second would otherwise share a folder.
        arguments.append(f"hydra.run.dir={logs / run.stages['score'].key}")
    # One thread for each job unless the user sets another number, as in the Makefile.
    environment = {"OMP_NUM_THREADS": "1", **ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    with process:
        for line in process.stdout or ():
            print(f"{run.name}: {line}", end="", flush=True)
    return process.returncode == 0
