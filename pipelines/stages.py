"""The stages: load, hand to a task, save. What each depends on stands in conf/stages."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning import LightningModule

from fp4dit import histograms, policy, reconstruction, scores
from fp4dit.columns import Room
from fp4dit.errors import UserError
from fp4dit.estimate import Cost, Estimator, calls
from fp4dit.footprint import bit_operations
from fp4dit.layer import QuantLayer
from fp4dit.metrics.base import PerImage, PerSet
from fp4dit.models.base import Source
from fp4dit.policy import Rule
from fp4dit.prompts import Prompts, texts
from fp4dit.ranges import whole
from fp4dit.reconstruction import Reconstruction, load_calls, load_steps, load_weights_, split
from fp4dit.resources import hide_loading_bars
from fp4dit.tasks import capture, generate, score
from fp4dit.tasks.activate import Measure, Observe, load_scales_, save_scales
from fp4dit.tasks.capture import Alteration, CaptureTask, Chunk, as_heard, chunked
from fp4dit.tasks.generate import GenerateTask
from fp4dit.tasks.histograms import Watch
from fp4dit.tasks.reconstruct import Fit
from fp4dit.tasks.score import ScoreTask, Shard, gathered, shards
from fp4dit.training.layer import TrainRule, load_trained_
from pipelines.objective import COSTS
from pipelines.parted import Parted, one_by_one
from pipelines.runtime import Runtime

hide_loading_bars()  # a stage has a progress of its own to show


@dataclass(frozen=True)
class Calibration:
    """`trained` prompts to learn from and `held_out` more to measure on, denoised `chunk` at a time. Of the sampler's
    `steps` so many `timesteps` are kept, evenly spread, or all."""

    prompts: Prompts
    trained: int
    held_out: int
    chunk: int
    seed: int
    steps: int
    guidance: float
    alter: Alteration = as_heard
    timesteps: int | None = None

    def __post_init__(self) -> None:
        if self.trained < 1 or self.held_out < 1 or self.chunk < 1:
            raise UserError("calibration.trained, calibration.held_out and calibration.chunk must be at least 1")
        if self.timesteps is not None and not 1 <= self.timesteps <= self.steps:
            raise UserError(
                f"calibration.timesteps={self.timesteps}: of the sampler's {self.steps} steps, keep 1 or more"
            )

    @property
    def kept(self) -> int:
        return self.timesteps or self.steps

    @property
    def rows(self) -> tuple[int, int]:
        """How many calls there are to learn from, and to measure on."""
        return calls(self.trained, self.kept, self.guidance), calls(self.held_out, self.kept, self.guidance)

    @property
    def drawn(self) -> list[str]:
        return texts(self.prompts(self.trained + self.held_out))


@dataclass(frozen=True)
class Generation:
    steps: int
    guidance: float
    chunk: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.chunk < 1:
            raise UserError("generation.steps and generation.chunk must be at least 1")


@dataclass(frozen=True)
class Capture(Parted):
    """The calls that the transformer gets while the sampler runs."""

    label = "capture"
    folder = "calls"

    model: Source
    calibration: Calibration

    def cost(self, at: Estimator) -> Cost:
        c = self.calibration
        prompts = c.trained + c.held_out
        disk = at.captured(prompts, c.kept, c.guidance)
        return at.sampling(prompts, c.steps, c.guidance, c.chunk, [], disk, "calibration.chunk")

    def check(self) -> None:
        self.model.check(self.calibration.drawn)

    def items(self, needs: Mapping[str, Path]) -> list[Chunk]:
        return chunked(self.calibration.drawn, self.calibration.chunk, self.calibration.seed)

    def files(self, item: Chunk, folder: Path) -> list[Path]:
        return capture.files(folder, item)

    def task(self, needs: Mapping[str, Path], folder: Path) -> LightningModule:
        c = self.calibration
        return CaptureTask(self.model.load(), folder, c.steps, c.guidance, c.alter, c.kept)


@dataclass(frozen=True)
class Reconstruct:
    """Hard weights and their scales, unit by unit."""

    model: Source
    weight: Sequence[Rule]
    rounding: Fit
    calibration: Calibration
    activation: Sequence[Rule] | None = None

    def check(self) -> None:
        reconstruction.check(self.model.skeleton().dit, self.weight, self.rounding, self.activation or ())

    def cost(self, at: Estimator) -> Cost:
        at_once = 2 * self.calibration.chunk
        return at.reconstruction(
            *self.calibration.rows, at_once, self.rounding, self.activation or (), "rounding.batch"
        )

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        c, pipeline = self.calibration, self.model.load()
        pipeline.to(runtime.device)
        audit = policy.check_weights(pipeline.dit, self.weight)
        size = policy.checkpoint_bytes(pipeline.dit, audit)
        rules = policy.assign(policy.layers(pipeline.dit), self.weight)
        (out / "units").mkdir(exist_ok=True)
        room = Room(1e9 * runtime.memory_budget_gb, out)
        columns = load_calls(needs["calls"] / "calls", room)
        trained, held_out = split(columns, c.trained)
        work = Reconstruction(
            pipeline,
            rules,
            self.rounding,
            trained,
            held_out,
            2 * c.chunk,
            out / "units",
            activation=self.activation or (),
            room=room,
        )
        reports = work.run(columns, lambda label: partial(runtime.trainer, f"reconstruct {label}"))
        blocks = [{"unit": r["unit"], "error": r["error"]} for r in reports]
        write_csv(out / "curve.csv", [{"unit": r["unit"], **point} for r in reports for point in r["curve"]])
        write_json(out / "blocks.json", blocks)
        error = sum(block["error"] for block in blocks) / len(blocks)
        steps = max((point["step"] + 1 for r in reports for point in r["curve"]), default=0)
        bits = {
            "bits_weight": policy.effective_bits(audit),
            "checkpoint_bytes": size,
            "block_error": error,
            "steps": steps,
        }
        made = policy.as_made(pipeline.dit, audit)
        write_json(out / "audit.json", {"layers": policy.as_rows(made), **bits})


@dataclass(frozen=True)
class Activate:
    """Activation quantizers on the quantized weights: static ones fixed, all of them measured."""

    model: Source
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    calibration: Calibration

    def check(self) -> None:
        policy.check_activations(self.model.skeleton().dit, self.weight, self.activation)

    def cost(self, at: Estimator) -> Cost:
        trained, held_out = self.calibration.rows
        observed = trained if any(rule.observe for rule in self.activation) else 0
        return at.replay(observed, held_out, 2 * self.calibration.chunk, self.activation, "calibration.chunk")

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        pipeline = self.model.load()
        activations, rules = load_weights_(pipeline, self.weight, self.activation, needs["weights"] / "units")
        observed = {name: rule for name, rule in rules.items() if rule.observe and activations[name].scaling is None}
        trained, held_out = load_steps(needs["calls"] / "calls", self.calibration.trained)
        if observed:
            observe = Observe(pipeline, activations, observed)
            runtime.trainer("activate: observe", devices=1).test(observe, one_by_one(trained), verbose=False)
            observe.fix()
        measure = Measure(pipeline, activations)
        runtime.trainer("activate: measure", devices=1).test(measure, one_by_one(held_out), verbose=False)
        save_scales(activations, out / "scales.safetensors")
        write_csv(out / "sqnr.csv", measure.sqnr())
        audit = measure.audit(rules)
        bits = policy.effective_bits(audit) if audit else 16.0
        work = bit_operations(self.model.skeleton(), self.weight, self.activation)
        found = {"layers": policy.as_rows(audit), "bits_activation": bits, "bit_operations": work}
        write_json(out / "audit.json", found)


@dataclass(frozen=True)
class Histograms:
    """Where weights and activations lie on the grids of their formats, for reports."""

    model: Source
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    calibration: Calibration

    def cost(self, at: Estimator) -> Cost:
        return at.replay(0, self.calibration.rows[1], 2 * self.calibration.chunk, self.activation, "calibration.chunk")

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        pipeline = self.model.load()
        before = histograms.originals(policy.layers(pipeline.dit))
        activations, _ = load_weights_(pipeline, self.weight, self.activation, needs["weights"] / "units")
        load_scales_(activations, needs["activations"] / "scales.safetensors")
        _, held_out = load_steps(needs["calls"] / "calls", self.calibration.trained)
        watch = Watch(pipeline, activations)
        runtime.trainer("histograms", devices=1).test(watch, one_by_one(held_out), verbose=False)
        layers = {name: layer for name, layer in pipeline.dit.named_modules() if isinstance(layer, QuantLayer)}
        weights = {name: histograms.of_weight(layer, before[whole(name)]).told() for name, layer in layers.items()}
        found = {"weight": weights, "activation": {name: seen.told() for name, seen in watch.found.items()}}
        write_json(out / "histograms.json", found)


@dataclass(frozen=True)
class Generate(Parted):
    """One image per prompt. Without rules for the weights it is the full-precision reference, or what a transformer
    draws that was trained anew, in few bits as `linear` says."""

    label = "generate"
    folder = "images"

    model: Source
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    generation: Generation
    prompts: Prompts
    count: int
    linear: Sequence[TrainRule] = ()

    def cost(self, at: Estimator) -> Cost:
        g = self.generation
        images = at.images(self.count)
        return at.sampling(self.count, g.steps, g.guidance, g.chunk, self.activation, images, "generation.chunk")

    def check(self) -> None:
        if self.count < 1:
            raise UserError("prompts.count must be at least 1")
        self.model.check(texts(self.prompts(self.count)))

    def items(self, needs: Mapping[str, Path]) -> list[Chunk]:
        return chunked(texts(self.prompts(self.count)), self.generation.chunk, self.generation.seed)

    def files(self, item: Chunk, folder: Path) -> list[Path]:
        return generate.files(folder, item)

    def task(self, needs: Mapping[str, Path], folder: Path) -> LightningModule:
        pipeline = self.model.load()
        if "trained" in needs:
            load_trained_(pipeline.dit, needs["trained"] / "transformer.safetensors", self.linear)
        elif "weights" in needs:
            activations, _ = load_weights_(pipeline, self.weight, self.activation, needs["weights"] / "units")
            load_scales_(activations, needs["activations"] / "scales.safetensors")
        return GenerateTask(pipeline, folder, self.generation.steps, self.generation.guidance)

    def finish(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        if not {"trained", "weights"} & needs.keys():
            skeleton = self.model.skeleton()
            size, work = policy.checkpoint_bytes(skeleton.dit, []), bit_operations(skeleton, [], [])
            found = {"bits_weight": 16, "bits_activation": 16, "checkpoint_bytes": size, "bit_operations": work}
            write_json(out / "audit.json", found)
        seeds = [seed for chunk in self.items(needs) for seed in chunk.seeds]
        drawn = [
            {"prompt": prompt.text, "seed": seed} | ({"group": prompt.group} if prompt.group else {})
            for prompt, seed in zip(self.prompts(self.count), seeds, strict=True)
        ]
        write_json(out / "images.json", drawn)


@dataclass(frozen=True)
class Score(Parted):
    """Every metric of every image, or of all, and what the weights and activations cost."""

    label = "score"
    folder = "shards"

    metrics: Mapping[str, Callable[[], PerImage | PerSet]]

    def items(self, needs: Mapping[str, Path]) -> list[Shard]:
        prompts = [entry["prompt"] for entry in read_json(needs["images"] / "images.json")]
        return shards(needs["images"] / "images", needs["reference"] / "images", prompts)

    def files(self, item: Shard, folder: Path) -> list[Path]:
        return score.files(folder, item)

    @cached_property
    def made(self) -> dict[str, PerImage | PerSet]:
        return {name: make() for name, make in self.metrics.items()}

    def asked(self, needs: Mapping[str, Path]) -> dict[str, PerImage | PerSet]:
        """Images are not compared with themselves."""
        itself = needs["images"] == needs["reference"]
        return {name: metric for name, metric in self.made.items() if not (itself and metric.compares)}

    def task(self, needs: Mapping[str, Path], folder: Path) -> LightningModule:
        return ScoreTask(*scores.split(self.asked(needs)), folder)

    def finish(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        drawn, found = read_json(needs["images"] / "images.json"), gathered(out / self.folder, runtime.device)
        told = scores.report(self.asked(needs), found, drawn)
        write_json(out / "metrics.json", {**told, "scalars": costs(needs)})


def costs(needs: Mapping[str, Path]) -> Mapping[str, int | float]:
    """Bits, bytes, errors, losses, and the seconds that capture and reconstruction took."""
    roles = ("weights", "activations", "images", "trained")
    audits = [needs[role] / "audit.json" for role in roles if role in needs]
    found = {name: value for path in audits if path.exists() for name, value in read_json(path).items()}
    learnt = (needs[role] for role in ("calls", "rounded", "weights") if role in needs)
    seconds = [read_json(folder / "manifest.json")["seconds"] for folder in learnt]
    return {name: found[name] for name in COSTS if name in found} | (
        {"calibration_seconds": sum(seconds)} if seconds else {}
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ())
        writer.writeheader()
        writer.writerows(rows)
