"""Estimate how the main tables of FP4DiT scale over GPUs: `python -m benchmarks.scaling`.

Every row of three tables is planned as in a run, the times and files of its stages are estimated
from shapes, and a sweep is simulated: a job takes a worker, runs its stages in order, and waits for
a stage that another job runs. The tables go to outputs/benchmarks/scaling.md. `AssumedGpu` holds
all assumptions; nothing was measured here.
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

from benchmarks.published import build_random_transformer
from benchmarks.timing import format_header, format_row
from fp4dit.estimate.footprint import measure_footprint
from fp4dit.estimate.machine import Machine
from fp4dit.estimate.stages import Estimator
from fp4dit.quantization.rules import Rule, match_rules
from fp4dit.utils.formatting import format_bytes
from pipelines.config.resolvers import CONF, register_resolvers
from pipelines.planning.plan import PlannedStage, make_plan

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
# Stages that devices share. Units are rounded one after another.
SPLIT = ("capture", "generate", "reference", "score")


@dataclass(frozen=True)
class AssumedGpu:
    """Assumptions about a GPU.

    Attributes:
        speed: Operations per second of a product in 16 bits.
        memory: Bytes per second of its memory.
        moved: Bytes that move for each activation that is quantized.
        scored: Images per second that all metrics together score.
    """

    speed: float = 660e12
    memory: float = 3.35e12
    moved: float = 40.0
    scored: float = 20.0


class AssumedEstimator(Estimator):
    """Estimator that derives the time to quantize activations from the bytes they move."""

    assumed = AssumedGpu()

    def estimate_quantize_seconds(self, rules: Sequence[Rule]) -> float:
        """Return the seconds to quantize the activations of a forward pass."""
        values = 0
        for name in match_rules(self.footprint.activation_shapes, rules):
            values += self.footprint.activation_shapes[name].numel()
        return values * self.assumed.moved / self.assumed.memory


@dataclass(frozen=True)
class Task:
    """Stage with its seconds on one device, and the bytes that it leaves on the disk."""

    stage: str
    key: str
    seconds: float
    disk: int
    needs: Sequence[str]

    def seconds_on(self, devices: int) -> float:
        """Return the seconds on so many devices."""
        return self.seconds / devices if self.stage in SPLIT else self.seconds


def simulate_schedule(jobs: Sequence[Sequence[Task]], workers: int, devices: int = 1) -> float:
    """Return the seconds until all jobs are done.

    Each worker has so many devices. A stage runs once: a job that reaches it while another one
    runs it waits.
    """
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
        done.setdefault(task.key, now + task.seconds_on(devices))
        heapq.heappush(clocks, (max(now, done[task.key]), worker))
    return last


def distinct_tasks(jobs: Sequence[Sequence[Task]]) -> dict[str, Task]:
    """Return the stages of all jobs by key."""
    return {task.key: task for job in jobs for task in job}


def critical_path(jobs: Sequence[Sequence[Task]], devices: int = 1) -> float:
    """Return the seconds of the longest chain of stages, which is a bound for all workers."""
    ends: dict[str, float] = {}
    for task in distinct_tasks(jobs).values():  # Each job lists them in order.
        ends[task.key] = task.seconds_on(devices) + max(
            (ends[key] for key in task.needs), default=0.0
        )
    return max(ends.values())


def plan_tasks(
    steps: Mapping[str, PlannedStage], targets: Sequence[str] = ("score",)
) -> list[Task]:
    """Return the stages that the targets of a planned run need, in order."""
    stages = {}
    for name, step in steps.items():
        if "model" in step.config:
            stages[name] = step.instantiate_stage()
    drawing = stages[steps["score"].needs["images"]]
    skeleton = drawing.model.build_on_meta()
    dtype: Any = skeleton.transformer.dtype
    machine = Machine(torch.device("cuda"), AssumedGpu().speed, 10**12, 10**15, 80 * 10**9)
    estimator = AssumedEstimator(measure_footprint(skeleton, drawing.weight), machine, 64e9, dtype)
    needed: set[str] = set()
    queue = list(targets)
    while queue:
        needed.add(name := queue.pop())
        queue += steps[name].needs.values()

    def task(name: str, step: PlannedStage) -> Task:
        needs = [steps[need].key for need in step.needs.values()]
        if name not in stages:
            return Task(name, step.key, drawing.count / AssumedGpu().scored, 0, needs)
        cost = stages[name].estimate_cost(lambda: estimator)
        return Task(name, step.key, cost.seconds, cost.disk_bytes, needs)

    return [task(name, step) for name, step in steps.items() if name in needed]


def write_pipeline_folder(model: str, root: Path) -> Path:
    """Write the files of a pipeline's folder that a plan reads, and return the folder."""
    with torch.device("meta"):
        transformer = build_random_transformer(model)
    (root / model / "transformer").mkdir(parents=True)
    transformer.save_config(root / model / "transformer")  # pyright: ignore
    index = {
        "_class_name": PIPELINES[model],
        "transformer": ["diffusers", type(transformer).__name__],
    }
    (root / model / "model_index.json").write_text(json.dumps(index))
    return root / model


def plan_table(table: str, model: Path, count: int) -> Iterator[list[Task]]:
    """Yield the rows of a table as jobs.

    The prompts are those of the shapes world, because encoding them takes no time.
    """
    register_resolvers()
    config: Any = OmegaConf.load(CONF / "table" / f"{table}.yaml")
    replaced = ("prompts=", "metrics=", "trainer=")
    base = [override for override in config.base if not override.startswith(replaced)]
    fixed = [f"model.path={model}", "prompts=shapes", "metrics=psnr", f"prompts.count={count}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for row in config.rows:
            yield plan_tasks(make_plan(compose("run", [*base, *row.overrides, *fixed])))


def format_report(
    jobs: Sequence[Sequence[Task]], gpus: Sequence[int], devices: Sequence[int]
) -> Iterator[str]:
    """Yield the lines of the Markdown tables."""
    work = sum(task.seconds for task in distinct_tasks(jobs).values())
    stages = len(distinct_tasks(jobs))
    yield f"{len(jobs)} jobs, {stages} stages, {work / 3600:.0f} hours of one GPU in all."
    yield ""
    yield from format_header(
        "GPUs",
        "devices of a job",
        "hours",
        "times one GPU",
        "share of them busy",
        "longest chain, hours",
    )
    for count in gpus:
        for each in (d for d in devices if d <= count):
            hours = simulate_schedule(jobs, count // each, each) / 3600
            busy, chain = work / 3600 / hours / count, critical_path(jobs, each) / 3600
            yield format_row(
                str(count),
                str(each),
                f"{hours:.1f}",
                f"{work / 3600 / hours:.1f}",
                f"{busy:.2f}",
                f"{chain:.1f}",
            )
    yield ""
    yield from format_header(
        "stage", "how many", "hours of one GPU", "longest, hours", "files of all", "of the largest"
    )
    for name in dict.fromkeys(task.stage for task in distinct_tasks(jobs).values()):
        same_stage = [task for task in distinct_tasks(jobs).values() if task.stage == name]
        hours, files = (
            [task.seconds / 3600 for task in same_stage],
            [task.disk for task in same_stage],
        )
        yield format_row(
            name,
            str(len(same_stage)),
            f"{sum(hours):.1f}",
            f"{max(hours):.1f}",
            format_bytes(sum(files)),
            format_bytes(max(files)),
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        jobs = []
        for model, table in TABLES.items():
            folder = write_pipeline_folder(model, Path(root))
            jobs += plan_table(table, folder, count=10_000)
    lines = [f"{AssumedGpu()}", "", *format_report(jobs, (1, 8, 64), (1, 4, 8))]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
