"""Measure drawing without quantization in fp32 and in bf16, by the instructions of the processor.

Run `python -m benchmarks.full_precision [IMAGES]`. It draws images of the shipped model in fp32,
and in bf16 in three ways. In the first two, only the transformer computes in bf16, by autocast or
with weights of bf16 and inputs and outputs that are cast, and the sampler keeps its state in fp32.
In the third, the whole pipeline is in bf16. The PSNR is that to the images of fp32. Each set of
instructions has a process of its own, because oneDNN reads `ONEDNN_MAX_CPU_ISA` only once.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.adaround import CPU
from benchmarks.cpu import SHIPPED
from benchmarks.gpu import run_in_process
from benchmarks.timing import format_header, format_row, time_in_turn
from fp4dit.data.prompts import get_texts
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions

ISAS = ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE")
STEPS, GUIDANCE, TURNS = 20, 4.5, 3
TIMED = 8  # images whose drawing is timed

Forward = Callable[..., tuple[Tensor, ...]]


def keep_precision(pipe: Any) -> None:
    """Leave a pipeline as it is."""


def use_autocast(pipe: Any) -> None:
    """Compute the calls of the transformer under autocast, and return fp32."""
    forward: Forward = pipe.transformer.forward

    def forward_in_bf16(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        return tuple(x.float() for x in output)

    pipe.transformer.forward = forward_in_bf16


def cast_calls(pipe: Any) -> None:
    """Round the weights of the transformer to bf16, cast its inputs, and return fp32."""
    forward: Forward = pipe.transformer.bfloat16().forward

    def forward_in_bf16(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        cast = {name: to_bf16(value) for name, value in kwargs.items()}
        return tuple(x.float() for x in forward(*map(to_bf16, args), **cast))

    pipe.transformer.forward = forward_in_bf16


def to_bf16(value: Any) -> Any:
    """Return an fp32 tensor in bf16, and anything else unchanged."""
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def use_bf16_throughout(pipe: Any) -> None:
    """Round all weights to bf16, so that the state of the sampler is in bf16 too."""
    pipe.to(torch.bfloat16)


SIDES: Mapping[str, Callable[[Any], None]] = {
    "fp32": keep_precision,
    "transformer in bf16, by autocast": use_autocast,
    "transformer in bf16, by casts": cast_calls,
    "all in bf16": use_bf16_throughout,
}


def draw(pipeline: Any, count: int) -> Tensor:
    """Draw images of held-out captions, in batches of 8."""
    texts = get_texts(draw_captions(count, ShapesWorld(), held_out=True))
    prompts, batches = [str(text) for text in texts], []
    for first in range(0, count, TIMED):
        seeds = range(first, min(first + TIMED, count))
        batches.append(pipeline.sample([prompts[i] for i in seeds], seeds, STEPS, GUIDANCE))
    return torch.cat(batches).clamp(0, 1)


def measure_sides(isa: str, count: int) -> dict[str, tuple[float, float, float]]:
    """Return the seconds to draw 8 images, and the mean and least PSNR in dB, by side.

    Args:
        isa: the most that oneDNN may use.
        count: number of images for the PSNR.
    """
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    torch.set_num_threads(1)
    draws = {}
    for side, change in SIDES.items():
        pipeline: Any = SHIPPED.load()
        change(pipeline.pipe)
        draws[side] = partial(draw, pipeline)
    timed = {side: partial(draw_some, TIMED) for side, draw_some in draws.items()}
    times = time_in_turn(timed, TURNS, CPU)
    images = {side: draw_some(count) for side, draw_some in draws.items()}
    results = {}
    for side, drawn in images.items():
        psnr = -10 * (drawn - images["fp32"]).square().flatten(1).mean(1).log10()
        results[side] = min(times[side]) / 1000, psnr.mean().item(), psnr.min().item()
    return results


def report(count: int, run: Callable[..., Any] = run_in_process) -> Iterator[str]:
    """Yield the lines of a Markdown table.

    Args:
        count: number of images for the PSNR.
        run: a function that calls another function in a process of its own.
    """
    columns = ("s", "of fp32", "PSNR to fp32, dB", "least")
    yield from format_header(f"ONEDNN_MAX_CPU_ISA, {TIMED} images in {STEPS} steps", *columns)
    for isa in ISAS:
        results = run(measure_sides, isa, count)
        for side, (seconds, psnr, least) in results.items():
            share = f"{seconds / results['fp32'][0]:.2f}"
            yield format_row(
                f"{isa}: {side}", f"{seconds:.2f}", share, f"{psnr:.1f}", f"{least:.1f}"
            )


if __name__ == "__main__":
    for line in report(int(sys.argv[1]) if sys.argv[1:] else 32):
        print(line, flush=True)
