"""`dry_run=true`: what a run or a sweep would make, what is there, and what it would take; nothing is touched."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fp4dit.locks import held, holder
from fp4dit.store import Store, drafted, lock
from fp4dit.stored import contents
from pipelines.missing import Measured
from pipelines.plan import Step, check, pending, planned
from pipelines.units import aligned, duration, size

if TYPE_CHECKING:
    from fp4dit.estimate import Cost

HEADING = ("job", "stage", "what", "time", "GPU memory", "host memory", "disk")


@dataclass(frozen=True)
class Ahead:
    """A stage of a job. `seconds` is None where nothing says how long it takes."""

    job: str
    stage: str
    key: str
    what: str
    make: bool
    seconds: float | None = None
    cost: "Cost | None" = None


def ahead(job: str, cfg: DictConfig, steps: Mapping[str, Step], store: Store) -> list[Ahead]:
    """A line for each stage. Stages that would run are built, and check themselves, as before a run."""
    todo = pending(steps, cfg.targets, store)
    costs = estimated(cfg, steps, todo)
    likes = Measured(finished(store), store)

    def line(step: Step) -> Ahead:
        if step not in todo:
            there = store.find(step.name, step.key) is not None
            return Ahead(job, step.name, step.key, "there" if there else "not needed", False)
        cost, known = costs.get(step.name), likes.seconds(step)
        seconds = known if known is not None else cost and cost.seconds
        return Ahead(job, step.name, step.key, state(store, step), True, seconds, cost)

    return [line(step) for step in steps.values()]


def state(store: Store, step: Step) -> str:
    out = store.path(step.name, step.key)
    if held(lock(out)):
        return f"being made by {holder(lock(out)) or 'another job'}"
    return "to make, from where it was left" if drafted(out).exists() else "to make"


def finished(store: Store) -> list[Step]:
    """What is in the store, by its manifests."""
    found = []
    for one in contents(store.root):
        if "config" in (manifest := one.manifest):
            step = planned(one.stage, {}, {**manifest["config"], "needs": manifest.get("needs", {})})
            found += [step] if step.key == one.key else []
    return found


def estimated(cfg: DictConfig, steps: Mapping[str, Step], todo: Sequence[Step]) -> dict[str, "Cost"]:
    stages = {step.name: step.make() for step in todo}
    for name, stage in stages.items():
        check(name, stage)
    able = {name: stage for name, stage in stages.items() if hasattr(stage, "cost")}
    if not able:
        return {}
    from pipelines.inspect import estimator  # here, for it needs torch
    from pipelines.listing import warnings

    at = estimator(cfg, steps[steps["score"].needs["images"]].make())
    costs = {name: stage.cost(at) for name, stage in able.items()}
    for text in warnings(costs, at.machine, at.budget, cfg.outputs):
        print(f"warning: {text}", file=sys.stderr)
    return costs


class Told(Callback):
    """Prints what all jobs have returned, when the last one has."""

    def __init__(self) -> None:
        self.found: list[Ahead] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.get("dry_run") and job_return.status == JobStatus.COMPLETED:
            self.found += job_return.return_value or []

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        self.tell()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self.tell()

    def tell(self) -> None:
        if self.found:
            print(*table(self.found), sep="\n")


def table(found: Sequence[Ahead]) -> Iterator[str]:
    first: dict[str, Ahead] = {}
    for one in found:
        if one.make:
            first.setdefault(one.key, one)
    own = [one for one in first.values() if one.cost]
    most = lambda sizes: size(max(sizes, default=0))
    known = [one.seconds for one in first.values() if one.seconds is not None]
    total = (
        "in all",
        "",
        f"{len(first)} to make",
        f"{duration(sum(known))}{'' if len(known) == len(first) else ' and more'}",
    )
    memory = (most(one.cost.device for one in own if one.cost), most(one.cost.host for one in own if one.cost))
    disk = size(sum(one.cost.disk for one in own if one.cost))
    yield from aligned([HEADING, *(row(one, first) for one in found), (*total, *memory, disk)])
    yield "Times are those of like stages in the store, or else rough estimates for one device. Nothing was made."


def row(one: Ahead, first: Mapping[str, Ahead]) -> tuple[str, ...]:
    earlier = first.get(one.key, one)
    if earlier is not one:
        return one.job, one.stage, f"made by {earlier.job}", "", "", "", ""
    time = ("" if not one.make else "not estimated") if one.seconds is None else duration(one.seconds)
    cost = one.cost
    return one.job, one.stage, one.what, time, *(map(size, (cost.device, cost.host, cost.disk)) if cost else ("",) * 3)


@contextmanager
def untouched(arguments: list[str]) -> Iterator[list[str]]:
    """The arguments, and of a dry run those by which Hydra's folders, which it makes before we are asked, are gone
    afterwards, and all jobs run here whatever launcher is asked for."""
    if "dry_run=true" not in [given.lstrip("+").lower() for given in arguments]:
        yield arguments
        return
    with tempfile.TemporaryDirectory() as folder:
        here = [f"hydra.{mode}.dir='{folder}'" for mode in ("run", "sweep")]
        launcher = ("hydra/launcher=", "hydra.launcher.")
        yield [given for given in arguments if not given.lstrip("+~").startswith(launcher)] + here
