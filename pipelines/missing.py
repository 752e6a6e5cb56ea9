"""The rows that are not in the store yet: how to make them, how long that may take, and making them."""

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

from fp4dit.errors import UserError
from fp4dit.store import Store
from pipelines.plan import Step, pending
from pipelines.rows import Entry
from pipelines.units import duration

# As we were given it: `command` sets HYDRA_FULL_ERROR for itself, and the errors of a row's job should be short too.
ENVIRONMENT = dict(os.environ)


def line(module: str, *arguments: str) -> str:
    """What a user types to run one of our commands."""
    return shlex.join(["python", "-m", f"pipelines.{module}", *arguments])


def told(missing: Sequence[Entry], there: Sequence[Entry], again: Sequence[str], store: Store) -> Iterator[str]:
    """How to make each row that is missing, and all of them, and how long it may take, by the rows that are `there`.

    `again` is what the table itself was given.
    """
    known = Measured((step for entry in there for step in entry.steps.values()), store)
    costs = [known.expected(entry) for entry in missing]
    for entry, cost in zip(missing, costs, strict=True):
        yield f"missing: {entry.name} ({about(cost)}). To make it:\n  {line('run', *entry.arguments)}"
    for problem in dict.fromkeys(entry.plan.problem for entry in missing if entry.plan.problem):
        yield f"before that: {problem}"
    if None in [second for cost in costs for second in cost.values()] or not all(costs):
        yield "What is not estimated has no like in the store; pipelines.inspect, given the same, computes it roughly."
    if len(missing) > 1:
        whole = {key: second for cost in costs for key, second in cost.items()} if all(costs) else {}
        yield f"To make them all ({about(whole)} on one job):\n  {line('table', *again, 'run_missing=true', 'jobs=2')}"


def about(cost: Mapping[str, float | None]) -> str:
    known = [second for second in cost.values() if second is not None]
    return f"about {duration(sum(known))}" if known and len(known) == len(cost) else "time not estimated"


class Measured:
    """How long stages took that are in the store."""

    def __init__(self, steps: Iterable[Step], store: Store) -> None:
        self.store = store
        once = {step.key: step for step in steps}
        self.known = [(step, s) for step in once.values() if (s := store.seconds(step.name, step.key)) is not None]

    def expected(self, entry: Entry) -> dict[str, float | None]:
        """Seconds of each stage that has to run, by key: the median of its likes', as much as it has more to do."""
        todo = pending(entry.steps, ["score"], self.store) if entry.steps else []
        return {step.key: self.seconds(step) for step in todo}

    def seconds(self, step: Step) -> float | None:
        like = [second * work(step) / work(other) for other, second in self.known if alike(step, other)]
        return median(like) if like else None


def alike(step: Step, other: Step) -> bool:
    """Whether one tells how long the other takes: the same stage of the same model, and rounded by the same code."""
    kind = lambda s: (s.name, s.config.get("model"), s.config.get("rounding", {}).get("_target_"))
    return kind(step) == kind(other)


def work(step: Step) -> float:
    """What a stage's seconds are in proportion to: steps of learning, images, or calls of the transformer."""
    config: Mapping[str, Any] = step.config
    learnt, drawn, c = config.get("rounding", {}).get("steps"), config.get("generation"), config.get("calibration")
    if learnt:
        return learnt
    if drawn and "count" in config:
        return config["count"] * drawn["steps"]
    return (c["trained"] + c["held_out"]) * c["steps"] if isinstance(c, dict) else 1


def make(entries: Sequence[Entry], jobs: int, logs: Path) -> list[str]:
    """Run the jobs of these rows, `jobs` side by side; the names of those that failed, which stop no other."""
    if jobs < 1:
        raise UserError(f"jobs={jobs}: at least one job has to run")
    with ThreadPoolExecutor(jobs) as pool:
        good = list(pool.map(partial(run, logs=logs), entries))
    return [entry.name for entry, well in zip(entries, good, strict=True) if not well]


def run(entry: Entry, logs: Path) -> bool:
    """Whether the row's job went well. What it says is printed behind the row's name."""
    # A folder of its own, for runs that start within the same second would share one.
    own = [f"hydra.run.dir={logs / entry.steps['score'].key}"] if entry.steps else []
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.run", *entry.arguments, *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"OMP_NUM_THREADS": "1", **ENVIRONMENT, "PYTHONUNBUFFERED": "1"},  # one thread as in the Makefile
    )
    with process:
        for line in process.stdout or ():
            print(f"{entry.name}: {line}", end="", flush=True)
    return process.returncode == 0
