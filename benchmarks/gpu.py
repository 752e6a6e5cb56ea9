"""What a GPU takes for models of published size: `make bench-gpu`, which writes outputs/benchmarks/gpu.md.

Weights and texts are random, the architectures true: nothing is downloaded. What is asked is the calibration of the
paper, 128 prompts (8 more are held out) x 20 steps with guidance, and 2,500 steps of 16 calls for each block. Of this
a part is measured and the rest multiplied, as each line says; where time goes by rows and by steps it does so evenly.
Each part has a process of its own, whose peak it is.
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
from fp4dit import embeddings, policy
from fp4dit.columns import Room, write
from fp4dit.embeddings import Embeddings
from fp4dit.examples import Examples
from fp4dit.layer import QuantLayer
from fp4dit.models.hunyuan import Hunyuan
from fp4dit.models.pixart import PixArt, PixArtPipeline
from fp4dit.policy import Rule
from fp4dit.reconstruction import Reconstruction
from fp4dit.resume import Trainers
from fp4dit.rounding import ulp
from fp4dit.tasks.capture import CaptureTask, chunked
from fp4dit.tasks.reconstruct import Curve, Fit, Learnt, Relative
from pipelines.parted import one_by_one

OUT = Path("outputs/benchmarks/gpu.md")
TOKENS = 120  # of PixArt-alpha
SOURCES = {"pixart_alpha_512": PixArt("", tokens=TOKENS), "pixart_sigma": PixArt(""), "hunyuan": Hunyuan("")}
ALPHA = "pixart_alpha_512"
MODELS = {"PixArt-alpha 512": ALPHA, "PixArt-Sigma 1024": "pixart_sigma", "HunyuanDiT 1024": "hunyuan"}
ARITHMETIC, PEAK = 167e15, 790e12  # operations of PixArt-alpha's calibration, and a second's
TARGET = "asked are 600 s and 24 GB of the device"


@dataclass(frozen=True)
class Scale:
    """What is asked, and in the second part how much of it is measured."""

    prompts: int = 128
    held_out: int = 8
    sampler: int = 20
    steps: int = 2500
    batch: int = 16

    chunk: int = 8  # prompts captured at once: one chunk is measured
    measured_prompts: int = 16  # that blocks are advanced for
    measured_steps: int = 250  # of a block's fit
    layers: int = 4  # of the models whose blocks are measured: the first two warm up, the last two count
    step: tuple[int, int, int] = (1152, 1024, 16)  # width, tokens and batch of ours beside the plain reference
    dtype: torch.dtype = torch.float16

    @property
    def rows(self) -> int:
        return 2 * self.sampler * (self.prompts + self.held_out)

    @property
    def measured_rows(self) -> int:
        return 2 * self.sampler * self.measured_prompts


@dataclass(frozen=True)
class Found:
    """Seconds and peaks in GB. `basis` says what was measured."""

    seconds: float
    device: float | None
    host: float
    basis: str


@dataclass
class Timed:
    """A fit that notes when it began and when it ended."""

    fit: Fit
    device: torch.device
    times: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, module: nn.Module, layers: list[QuantLayer], examples: Examples, trainers: Trainers) -> Curve:
        began = adaround.now(self.device)
        curve = self.fit(module, layers, examples, trainers)
        self.times.append((began, adaround.now(self.device)))
        return curve


def peaks(device: torch.device) -> tuple[float | None, float]:
    """In GB, of the device's memory and of the host's."""
    on_device = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def capture(scale: Scale, device: torch.device) -> Found:
    """Seconds of all chunks, from one; a first, short one is not counted."""
    chunks = -(-(scale.prompts + scale.held_out) // scale.chunk)
    prompts = [str(i) for i in range(scale.chunk)]
    row = torch.randn(TOKENS, published.PUBLISHED[ALPHA][1]["caption_channels"]).to(scale.dtype)
    with tempfile.TemporaryDirectory() as folder:
        texts, mask = row.expand(1 + len(prompts), *row.shape), torch.ones(1 + len(prompts), len(row), dtype=torch.long)
        embeddings.save(["", *prompts], texts, mask, Path(folder) / "texts")
        pipe = published.pipeline(ALPHA, scale.dtype)
        pipeline = PixArtPipeline(pipe.transformer, len(row), pipe, Embeddings(f"{folder}/texts"))
        pipeline.to(device)
        for steps in (2, scale.sampler):
            out = Path(folder) / str(steps)
            out.mkdir(exist_ok=True)
            began = adaround.now(device)
            task = CaptureTask(pipeline, out, steps, 4.5)
            adaround.trainer(device)().predict(task, one_by_one(chunked(prompts, scale.chunk, 0)))
            seconds = adaround.now(device) - began
    return Found(chunks * seconds, *peaks(device), f"1 of {chunks} chunks of {scale.chunk} prompts")


def block(model: str, scale: Scale, device: torch.device) -> Found:
    """Seconds of a block: both models advanced by it, and its roundings learnt."""
    dit = nn.Module.to(published.build(model, num_layers=scale.layers), scale.dtype)
    pipeline = SOURCES[model].around(dit.to(device))
    fit = Learnt(ulp, adaround.ADAM, Relative(), scale.measured_steps, scale.batch, precision="bf16-mixed")
    timed, trained = Timed(fit, device), torch.arange(scale.measured_rows)
    rules = policy.assign(policy.layers(dit), [Rule("*blocks.*", adaround.GROUPS[0].quantizer)])
    with tempfile.TemporaryDirectory() as folder:
        columns = {}
        for name, row in published.given(pipeline).items():
            columns[name] = Room().column(torch.Size([scale.measured_rows, *row.shape]), row.dtype)
            write(columns[name], 0, row.expand(columns[name].shape))
        work = Reconstruction(pipeline, rules, timed, trained, trained[:1], 2 * scale.chunk, Path(folder))
        work.run(columns, lambda _: adaround.trainer(device))
    last = timed.times[-3:]
    learning = sum(end - began for began, end in last[1:]) / 2
    advancing = sum(b[0] - a[1] for a, b in pairwise(last)) / 2
    seconds = advancing * scale.rows / scale.measured_rows + learning * scale.steps / scale.measured_steps
    measured = f"{scale.measured_rows} of {scale.rows} rows, {scale.measured_steps} of {scale.steps} steps"
    count = published.PUBLISHED[model][1]["num_layers"]
    return Found(seconds, *peaks(device), f"2 of {count} blocks, {measured}")


def table(scale: Scale, device: torch.device, run: Callable[..., Any]) -> Iterator[str]:
    """Lines of Markdown. `run` calls a part."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield f"{card}, torch {torch.__version__}"
    yield from ("", "| | seconds | GB of the device | GB of the host | measured |", "|---|---:|---:|---:|---|")
    captured = run(capture, scale, device)
    yield line("PixArt-alpha 512, capture", captured)
    blocks = {name: run(block, model, scale, device) for name, model in MODELS.items()}
    for name, found in blocks.items():
        yield line(f"{name}, a block", found)
    one, count = blocks["PixArt-alpha 512"], published.PUBLISHED[ALPHA][1]["num_layers"]
    seconds = captured.seconds + count * one.seconds
    yield f"| PixArt-alpha 512, capture and {count} blocks | {seconds:.0f} | | | their sum, not one run; {TARGET} |"
    yield ""
    yield f"{ARITHMETIC / PEAK / seconds:.0%} of what {PEAK / 1e12:.0f} TFLOP/s would do, {ARITHMETIC / PEAK:.0f} s."
    width, tokens, batch = scale.step
    yield from ("", f"| a block of width {width}, {batch} x {tokens} tokens | ms a step | MiB more than before it |")
    yield "|---|---:|---:|"
    for part in adaround.PARTS:
        seconds, more = run(adaround.measure, part, *scale.step, device)
        yield f"| {part} | {1000 * seconds:.1f} | {more:.0f} |"


def line(name: str, found: Found) -> str:
    on_device = "" if found.device is None else f"{found.device:.1f}"
    return f"| {name} | {found.seconds:.1f} | {on_device} | {found.host:.1f} | {found.basis} |"


def alone(part: Callable[..., Any], *given: Any) -> Any:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(part, *given).result()


def main(scale: Scale, device: torch.device, out: Path, run: Callable[..., Any] = alone) -> None:
    lines = []
    for text in table(scale, device, run):
        print(text, flush=True)
        lines.append(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    main(Scale(), torch.device("cuda"), OUT)
