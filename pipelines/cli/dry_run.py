"""The dry run: list what a run or a sweep would make, and estimate what it would take.

A dry run (`dry_run=true`) builds and checks the stages, but leaves no file behind.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fp4dit.store.draft import draft_path, lock_path
from fp4dit.store.entries import list_entries
from fp4dit.store.locks import describe_holder
from fp4dit.store.store import Store
from fp4dit.utils.formatting import align_columns, format_bytes, format_duration
from pipelines.cli.costs import (
    collect_costs,
    format_sizes,
    list_cost_warnings,
    make_estimator,
)
from pipelines.planning.executor import build_stages, list_pending_stages
from pipelines.planning.plan import PlannedStage, make_planned_stage
from pipelines.results.missing import MeasuredTimes

if TYPE_CHECKING:
    from fp4dit.estimate.stages import Estimator, StageCost


HEADING = ("job", "stage", "state", "time", "GPU memory", "host memory", "disk")

NOTE = (
    "Times are those of similar stages in the store, or rough estimates for one device. "
    "Nothing was made."
)


@dataclass(frozen=True)
class DryRunStage:
    """Stage of a job in the report of a dry run.

    Args:
        job: Name of the job.
        stage: Name of the stage.
        key: Key of its result.
        state: Text that says whether the stage would run.
        is_pending: Whether the stage would run.
        seconds: Expected time, or None if it is not known.
        cost: Expected time and memory, or None if they cannot be estimated.

    Example:
        >>> DryRunStage("demo_4", "capture", "0123456789abcdef", "to make", True, seconds=12.0)
    """

    job: str
    stage: str
    key: str
    state: str
    is_pending: bool
    seconds: float | None = None
    cost: "StageCost | None" = None


def list_dry_run_stages(
    job: str, cfg: DictConfig, stages: Mapping[str, PlannedStage], store: Store
) -> list[DryRunStage]:
    """Return one entry for each stage of a job.

    The stages that would run are built and check their options, as they do before a run.

    Raises:
        UserError: if a stage cannot work with its options.
    """
    pending = list_pending_stages(stages, cfg.targets, store)
    costs = estimate_costs(cfg, stages, pending)
    times = MeasuredTimes(find_finished_stages(store), store)
    entries = []
    for name, stage in stages.items():
        if stage not in pending:
            is_stored = store.find_entry(name, stage.key) is not None
            state = "in the store" if is_stored else "not needed"
            entries.append(DryRunStage(job, name, stage.key, state, False))
            continue
        cost, seconds = costs.get(name), times.estimate_stage(stage)
        if seconds is None and cost is not None:
            seconds = cost.seconds
        state = describe_stage_state(store, stage)
        entries.append(DryRunStage(job, name, stage.key, state, True, seconds, cost))
    return entries


def describe_stage_state(store: Store, stage: PlannedStage) -> str:
    """Say whether a pending stage is new, is resumed, or is being made by another job."""
    out = store.get_path(stage.name, stage.key)
    if holder := describe_holder(lock_path(out), unknown="another job"):
        return f"being made by {holder}"
    return "to resume" if draft_path(out).exists() else "to make"


def find_finished_stages(store: Store) -> list[PlannedStage]:
    """Return the stages whose results are in the store, as their manifests describe them."""
    stages = []
    for entry in list_entries(store.root):
        manifest = entry.manifest
        if "config" in manifest:
            node = {**manifest["config"], "needs": manifest.get("needs", {})}
            stage = make_planned_stage(entry.stage, {}, node)
            if stage.key == entry.key:
                stages.append(stage)
    return stages


def estimate_costs(
    cfg: DictConfig, stages: Mapping[str, PlannedStage], pending: Sequence[PlannedStage]
) -> dict[str, "StageCost"]:
    """Build and check the pending stages, and estimate what each of them takes.

    Warnings about what would not fit are printed.

    Returns:
        The costs by stage. Stages that cannot be estimated are left out.
    """
    objects = build_stages(pending)

    @cache
    def make_cached_estimator() -> "Estimator":
        name = stages["score"].needs["images"]
        return make_estimator(cfg, objects.get(name) or stages[name].instantiate_stage())

    costs = collect_costs(objects, make_cached_estimator)
    if costs:
        estimator = make_cached_estimator()
        for text in list_cost_warnings(costs, estimator.machine, estimator.budget, cfg.outputs):
            print(f"warning: {text}", file=sys.stderr)
    return costs


class PrintDryRun(Callback):
    """Hydra callback that prints one table of a dry run's jobs when the last one has ended.

    Example:
        In `conf/run.yaml`: `hydra.callbacks.dry_run: {_target_: pipelines.cli.PrintDryRun}`
    """

    def __init__(self) -> None:
        self.entries: list[DryRunStage] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.get("dry_run") and job_return.status == JobStatus.COMPLETED:
            self.entries += job_return.return_value or []

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        self._print_table()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self._print_table()

    def _print_table(self) -> None:
        if self.entries:
            print(*format_dry_run(self.entries), sep="\n")


def format_dry_run(entries: Sequence[DryRunStage]) -> Iterator[str]:
    """Yield the lines of the table: a heading, the stages of all jobs, and their total.

    A stage that several jobs share is counted once, for the first of them.
    """
    first: dict[str, DryRunStage] = {}
    for entry in entries:
        if entry.is_pending:
            first.setdefault(entry.key, entry)
    rows = [format_dry_run_row(entry, first) for entry in entries]
    yield from align_columns([HEADING, *rows, _format_total(list(first.values()))])
    yield NOTE


def format_dry_run_row(entry: DryRunStage, first: Mapping[str, DryRunStage]) -> tuple[str, ...]:
    """Return the cells of one stage; `first` is the first job's entry for each pending key."""
    first_entry = first.get(entry.key, entry)
    if first_entry is not entry:
        return entry.job, entry.stage, f"made by {first_entry.job}", "", "", "", ""
    time, sizes = "", ("", "", "")
    if entry.seconds is not None:
        time = format_duration(entry.seconds)
    elif entry.is_pending:
        time = "not estimated"
    if entry.cost:
        sizes = format_sizes(entry.cost)
    return entry.job, entry.stage, entry.state, time, *sizes


def _format_total(pending: Sequence[DryRunStage]) -> tuple[str, ...]:
    """Return the cells of the last line: the sum of times and disk, the maximum of memory."""
    costs = [entry.cost for entry in pending if entry.cost]
    seconds = [entry.seconds for entry in pending if entry.seconds is not None]
    time = format_duration(sum(seconds))
    if len(seconds) < len(pending):
        time = f"at least {time}" if seconds else "not estimated"
    device = format_bytes(max((cost.device_bytes for cost in costs), default=0))
    host = format_bytes(max((cost.host_bytes for cost in costs), default=0))
    disk = format_bytes(sum(cost.disk_bytes for cost in costs))
    return "total", "", f"{len(pending)} to make", time, device, host, disk
