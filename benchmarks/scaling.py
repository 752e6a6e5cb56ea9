"""How the main tables of FP4DiT would scale over GPUs, on paper and by simulation: `python -m benchmarks.scaling`.

Every row of three tables is planned as a run plans it, its stages' times and files are estimated from shapes, and a
sweep is simulated: a job takes one worker, makes its stages in order, and waits for a stage that another job makes. It
writes outputs/benchmarks/scaling.md. What is assumed stands in `Assumed`; nothing of it was measured here.
"""

import heapq
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from benchmarks.markdown import head, row
from benchmarks.published import build
from fp4dit import policy
from fp4dit.estimate import Estimator
from fp4dit.footprint import footprint
from fp4dit.machine import Machine
from fp4dit.policy import Rule
from pipelines.plan import Step, plan
from pipelines.resolvers import CONF, register
from pipelines.units import size

OUT = Path("outputs/benchmarks/scaling.md")
TABLES = {
    "pixart_alpha_512": "fp4dit_main_pixart_alpha",
    "pixart_sigma": "fp4dit_main_pixart_sigma",
    "hunyuan": "fp4dit_main_hunyuan",
}
PIPELINES = {
    "pixart_alpha_512": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "hunyuan": "HunyuanDiTPipeline",
}
SPLIT = ("capture", "generate", "reference", "score")  # what devices share; units are rounded one after another


@dataclass(frozen=True)
class Assumed:
    """Of one GPU: operations per second of a product in 16 bits, bytes per second of its memory, bytes that move for
    each activation that is quantized, images scored per second by all metrics together."""

    speed: float = 660e12
    memory: float = 3.35e12
    moved: float = 40.0
    scored: float = 20.0


class OnPaper(Estimator):
    """With activations that take the time of their bytes, for no such device is here to be timed."""

    assumed = Assumed()

    def quantizing(self, rules: Sequence[Rule]) -> float:
        values = sum(self.footprint.seen[name].numel() for name in policy.matched(self.footprint.seen, rules))
        return values * self.assumed.moved / self.assumed.memory


@dataclass(frozen=True)
class Task:
    """A stage: how long one device takes, and what it leaves on the disk, in bytes."""

    stage: str
    key: str
    seconds: float
    disk: int
    needs: Sequence[str]

    def on(self, devices: int) -> float:
        return self.seconds / devices if self.stage in SPLIT else self.seconds


def schedule(jobs: Sequence[Sequence[Task]], workers: int, devices: int = 1) -> float:
    """Seconds until all jobs are done, each on a worker of so many devices. A stage is made once: whoever comes to it
    while another makes it, waits."""
    done: dict[str, float] = {}
    queue, clocks = [list(job) for job in jobs], [(0.0, k) for k in range(workers)]
    working: dict[int, list[Task]] = {}
    last = 0.0
    while clocks:
        now, worker = heapq.heappop(clocks)
        last = max(last, now)
        while not working.get(worker) and queue:
            working[worker] = queue.pop(0)
        if not working.get(worker):
            continue
        task = working[worker].pop(0)
        done.setdefault(task.key, now + task.on(devices))
        heapq.heappush(clocks, (max(now, done[task.key]), worker))
    return last


def distinct(jobs: Sequence[Sequence[Task]]) -> dict[str, Task]:
    return {task.key: task for job in jobs for task in job}


def critical(jobs: Sequence[Sequence[Task]], devices: int = 1) -> float:
    """Seconds of the longest chain of stages that need each other: no number of workers is faster."""
    ends: dict[str, float] = {}
    for task in distinct(jobs).values():  # each job has them in order
        ends[task.key] = task.on(devices) + max((ends[key] for key in task.needs), default=0.0)
    return max(ends.values())


def tasks(steps: Mapping[str, Step], targets: Sequence[str] = ("score",)) -> list[Task]:
    """Those of a planned run that its targets need, in order."""
    stages = {name: step.make() for name, step in steps.items() if "model" in step.config}
    drawing = stages[steps["score"].needs["images"]]
    skeleton = drawing.model.skeleton()
    dtype: Any = skeleton.dit.dtype
    machine = Machine(torch.device("cuda"), Assumed().speed, 10**12, 10**15, 80 * 10**9)
    estimator = OnPaper(footprint(skeleton, drawing.weight), machine, 64e9, dtype)
    wanted: set[str] = set()
    queue = list(targets)
    while queue:
        wanted.add(name := queue.pop())
        queue += steps[name].needs.values()

    def task(name: str, step: Step) -> Task:
        needs = [steps[need].key for need in step.needs.values()]
        if name not in stages:
            return Task(name, step.key, drawing.count / Assumed().scored, 0, needs)
        cost = stages[name].cost(estimator)
        return Task(name, step.key, cost.seconds, cost.disk, needs)

    return [task(name, step) for name, step in steps.items() if name in wanted]


def folder(model: str, root: Path) -> Path:
    """What a pipeline's folder holds that a plan reads."""
    with torch.device("meta"):
        transformer = build(model)
    (root / model / "transformer").mkdir(parents=True)
    transformer.save_config(root / model / "transformer")  # pyright: ignore
    index = {"_class_name": PIPELINES[model], "transformer": ["diffusers", type(transformer).__name__]}
    (root / model / "model_index.json").write_text(json.dumps(index))
    return root / model


def planned(table: str, model: Path, count: int) -> Iterator[list[Task]]:
    """The rows of a table as jobs. Prompts are those of the shapes world, for their words take no time."""
    register()
    own: Any = OmegaConf.load(CONF / "table" / f"{table}.yaml")
    base = [given for given in own.base if not given.startswith(("prompts=", "metrics=", "trainer="))]
    fixed = [f"model.path={model}", "prompts=shapes", "metrics=psnr", f"prompts.count={count}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for given in own.rows:
            yield tasks(plan(compose("run", [*base, *given.overrides, *fixed])))


def report(jobs: Sequence[Sequence[Task]], gpus: Sequence[int], devices: Sequence[int]) -> Iterator[str]:
    work = sum(task.seconds for task in distinct(jobs).values())
    yield f"{len(jobs)} jobs, {len(distinct(jobs))} stages, {work / 3600:.0f} hours of one GPU in all."
    yield ""
    yield from head("GPUs", "devices of a job", "hours", "times one GPU", "share of them busy", "longest chain, hours")
    for count in gpus:
        for each in (d for d in devices if d <= count):
            hours = schedule(jobs, count // each, each) / 3600
            busy, chain = work / 3600 / hours / count, critical(jobs, each) / 3600
            yield row(
                str(count), str(each), f"{hours:.1f}", f"{work / 3600 / hours:.1f}", f"{busy:.2f}", f"{chain:.1f}"
            )
    yield ""
    yield from head("stage", "how many", "hours of one GPU", "longest, hours", "files of all", "of the largest")
    for name in dict.fromkeys(task.stage for task in distinct(jobs).values()):
        own = [task for task in distinct(jobs).values() if task.stage == name]
        hours, files = [task.seconds / 3600 for task in own], [task.disk for task in own]
        yield row(name, str(len(own)), f"{sum(hours):.1f}", f"{max(hours):.1f}", size(sum(files)), size(max(files)))


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        jobs = [
            job for model, table in TABLES.items() for job in planned(table, folder(model, Path(root)), count=10_000)
        ]
    lines = [f"{Assumed()}", "", *report(jobs, (1, 8, 64), (1, 4, 8))]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
