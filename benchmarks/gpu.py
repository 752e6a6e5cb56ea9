"""Measure calibration of published models on a GPU: `make bench-gpu`.

Weights and texts are random, the architectures are the published ones, and nothing is downloaded.
The task is the calibration of the paper: 128 prompts and 8 more for validation x 20 steps with
guidance, and 2,500 steps of 16 calls for each block. A part of this is measured and the rest is
extrapolated, as each line of the output says; the time is proportional to rows and steps. Each part
is a process of its own with its own peak memory. The output is outputs/benchmarks/gpu.md.
"""

import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import adaround, published
from fp4dit.calibration.capture import CaptureTask, batch_prompts
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.data import embeddings
from fp4dit.data.columns import MemoryBudget, write_rows
from fp4dit.data.embeddings import PromptEmbeddings
from fp4dit.models.hunyuan import Hunyuan
from fp4dit.models.pixart import PixArt, PixArtAdapter
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.adaround import adaround_scale_aware
from fp4dit.rounding.base import Curve, RoundingMethod
from fp4dit.rounding.learned import LearnedRounding
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.utils.resumable import ResumableTrainers
from pipelines.stages.sharded import load_one_by_one

OUT = Path("outputs/benchmarks/gpu.md")
TOKENS = 120  # of PixArt-alpha
SOURCES = {
    "pixart_alpha_512": PixArt("", tokens=TOKENS),
    "pixart_sigma": PixArt(""),
    "hunyuan": Hunyuan(""),
}
ALPHA = "pixart_alpha_512"
MODELS = {
    "PixArt-alpha 512": ALPHA,
    "PixArt-Sigma 1024": "pixart_sigma",
    "HunyuanDiT 1024": "hunyuan",
}
CALIBRATION_FLOPS = 167e15  # operations of the calibration of PixArt-alpha
PEAK_FLOPS = 790e12  # operations per second
TARGET = "the target is 600 s and 24 GB of the device"


@dataclass(frozen=True)
class Scale:
    """Size of the task, and of the part of it that is measured.

    Args:
        chunk: prompts that are captured at once. One chunk is measured.
        measured_prompts: prompts whose calls are propagated through a block.
        measured_steps: steps of the reconstruction of a block.
        layers: blocks of the model. The first two warm up, and the last two are measured.
        step: width, tokens and batch size of a step beside the plain reference.
    """

    prompts: int = 128
    held_out: int = 8
    sampler: int = 20
    steps: int = 2500
    batch: int = 16

    chunk: int = 8
    measured_prompts: int = 16
    measured_steps: int = 250
    layers: int = 4
    step: tuple[int, int, int] = (1152, 1024, 16)
    dtype: torch.dtype = torch.float16

    @property
    def rows(self) -> int:
        """Calls of the transformer that the task captures."""
        return 2 * self.sampler * (self.prompts + self.held_out)

    @property
    def measured_rows(self) -> int:
        """Calls that are propagated through a block."""
        return 2 * self.sampler * self.measured_prompts


@dataclass(frozen=True)
class Measurement:
    """Seconds of the task, and peak memory in GB of the device and the host.

    `basis` says what part of the task was measured.
    """

    seconds: float
    device: float | None
    host: float
    basis: str


@dataclass
class TimedMethod(RoundingMethod):
    """Rounding method that records when it began and ended for each block."""

    fit: RoundingMethod
    device: torch.device
    times: list[tuple[float, float]] = field(default_factory=list)

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        examples: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        began = adaround.synchronized_time(self.device)
        curve = self.fit.round_unit(module, layers, examples, trainers)
        self.times.append((began, adaround.synchronized_time(self.device)))
        return curve


def peak_memory_gb(device: torch.device) -> tuple[float | None, float]:
    """Return the peak memory of the device and of the host in GB."""
    on_device = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_capture(scale: Scale, device: torch.device) -> Measurement:
    """Measure the capture of one chunk. A short one before it warms up."""
    chunks = -(-(scale.prompts + scale.held_out) // scale.chunk)
    prompts = [str(i) for i in range(scale.chunk)]
    row = torch.randn(TOKENS, published.PUBLISHED[ALPHA][1]["caption_channels"]).to(scale.dtype)
    with tempfile.TemporaryDirectory() as folder:
        texts = row.expand(1 + len(prompts), *row.shape)
        mask = torch.ones(1 + len(prompts), len(row), dtype=torch.long)
        embeddings.save_embeddings(["", *prompts], texts, mask, Path(folder) / "texts")
        pipe = published.build_pixart_pipeline(ALPHA, scale.dtype)
        pipeline = PixArtAdapter(
            pipe.transformer, len(row), pipe, PromptEmbeddings(f"{folder}/texts")
        )
        pipeline.to(device)
        for steps in (2, scale.sampler):
            out = Path(folder) / str(steps)
            out.mkdir(exist_ok=True)
            began = adaround.synchronized_time(device)
            task = CaptureTask(pipeline, out, steps, 4.5)
            adaround.bind_trainer(device)().predict(
                task, load_one_by_one(batch_prompts(prompts, scale.chunk, 0))
            )
            seconds = adaround.synchronized_time(device) - began
    return Measurement(
        chunks * seconds, *peak_memory_gb(device), f"1 of {chunks} chunks of {scale.chunk} prompts"
    )


def measure_block(model: str, scale: Scale, device: torch.device) -> Measurement:
    """Measure a block: the propagation of both models, and the reconstruction."""
    dit = nn.Module.to(
        published.build_random_transformer(model, num_layers=scale.layers), scale.dtype
    )
    pipeline = SOURCES[model].make_adapter(dit.to(device))
    fit = LearnedRounding(
        adaround_scale_aware,
        adaround.ADAM,
        RelativeMSE(),
        scale.measured_steps,
        scale.batch,
        precision="bf16-mixed",
    )
    timed, trained = TimedMethod(fit, device), torch.arange(scale.measured_rows)
    rules = assign_rules(find_layers(dit), [Rule("*blocks.*", adaround.GROUPS[0].quantizer)])
    with tempfile.TemporaryDirectory() as folder:
        columns = {}
        for name, row in published.make_random_inputs(pipeline).items():
            columns[name] = MemoryBudget().allocate(
                torch.Size([scale.measured_rows, *row.shape]), row.dtype
            )
            write_rows(columns[name], 0, row.expand(columns[name].shape))
        work = Reconstruction(
            pipeline, rules, timed, trained, trained[:1], 2 * scale.chunk, Path(folder)
        )
        work.run(columns, lambda _: adaround.bind_trainer(device))
    last = timed.times[-3:]
    reconstruction_seconds = sum(end - began for began, end in last[1:]) / 2
    propagation_seconds = sum(b[0] - a[1] for a, b in pairwise(last)) / 2
    seconds = propagation_seconds * scale.rows / scale.measured_rows
    seconds += reconstruction_seconds * scale.steps / scale.measured_steps
    measured = (
        f"{scale.measured_rows} of {scale.rows} rows, {scale.measured_steps} of {scale.steps} steps"
    )
    count = published.PUBLISHED[model][1]["num_layers"]
    return Measurement(seconds, *peak_memory_gb(device), f"2 of {count} blocks, {measured}")


def report_gpu(scale: Scale, device: torch.device, run: Callable[..., Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown.

    Args:
        run: a function that calls another function in a process of its own.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield from (f"{card}, torch {torch.__version__}", "")
    yield "| | seconds | GB of the device | GB of the host | measured |"
    yield "|---|---:|---:|---:|---|"
    capture = run(measure_capture, scale, device)
    yield format_measurement("PixArt-alpha 512, capture", capture)
    blocks = {name: run(measure_block, model, scale, device) for name, model in MODELS.items()}
    for name, measurement in blocks.items():
        yield format_measurement(f"{name}, a block", measurement)
    count = published.PUBLISHED[ALPHA][1]["num_layers"]
    seconds = capture.seconds + count * blocks["PixArt-alpha 512"].seconds
    title = f"PixArt-alpha 512, capture and {count} blocks"
    yield f"| {title} | {seconds:.0f} | | | their sum, not one run; {TARGET} |"
    yield ""
    least = CALIBRATION_FLOPS / PEAK_FLOPS
    yield f"{least / seconds:.0%} of what {PEAK_FLOPS / 1e12:.0f} TFLOP/s would do, {least:.0f} s."
    yield ""
    width, tokens, batch = scale.step
    title = f"a block of width {width}, {batch} x {tokens} tokens"
    yield f"| {title} | ms a step | MiB more than before it |"
    yield "|---|---:|---:|"
    for part in adaround.PARTS:
        seconds, mib = run(adaround.measure_step, part, *scale.step, device)
        yield f"| {part} | {1000 * seconds:.1f} | {mib:.0f} |"


def format_measurement(name: str, measurement: Measurement) -> str:
    """Return one row of the table."""
    m = measurement
    on_device = "" if m.device is None else f"{m.device:.1f}"
    return f"| {name} | {m.seconds:.1f} | {on_device} | {m.host:.1f} | {m.basis} |"


def run_in_process(part: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(part, *arguments).result()


def main(
    scale: Scale, device: torch.device, out: Path, run: Callable[..., Any] = run_in_process
) -> None:
    """Print the report, and write it to a file."""
    lines = []
    for line in report_gpu(scale, device, run):
        print(line, flush=True)
        lines.append(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    main(Scale(), torch.device("cuda"), OUT)
