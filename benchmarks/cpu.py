"""Models on a CPU: images of the shipped one, and a part of a full-size one; whole, simulated and packed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from benchmarks import published, steps
from benchmarks.adaround import CPU
from benchmarks.markdown import head, row
from benchmarks.packing import RTN_FP4, W4A8, read, save_packed, simulate_
from benchmarks.timing import in_turn, resident
from fp4dit.models.pixart import PixArt
from fp4dit.packed.export import pack_transformer_, size
from fp4dit.prompts import shapes, texts

SHIPPED = PixArt("pkg://fp4dit.models.shapes/weights", tokens=20)
WHOLE, SIMULATED, PACKED = SIDES = ("full precision", "simulated", "packed")


@dataclass(frozen=True)
class Scale:
    """`prompts` of the shipped model are drawn in `sampler` steps; of the full-size one so many `layers` are there."""

    prompts: int = 8
    sampler: int = 20
    repeats: int = 5
    model: str = "pixart_sigma_512"
    layers: int = 2
    dtype: torch.dtype = torch.bfloat16


def pack(folder: Path) -> None:
    """The shipped pipeline, its transformer packed, as an export has it."""
    pipeline: Any = SHIPPED.load()
    pack_transformer_(pipeline.dit, *simulate_(pipeline.dit, RTN_FP4))
    pipeline.save(folder)


def shipped(side: str, folder: Path) -> Any:
    pipeline = replace(SHIPPED, path=str(folder)).load() if side == PACKED else SHIPPED.load()
    if side == SIMULATED:
        simulate_(pipeline.dit, RTN_FP4)
    return pipeline


def drawing(pipeline: Any, scale: Scale) -> Callable[[], object]:
    prompts = [str(prompt) for prompt in texts(shapes(scale.prompts, held_out=True))]
    return lambda: pipeline.sample(prompts, range(scale.prompts), scale.sampler, 4.5)


def peak(side: str, folder: Path, scale: Scale) -> float:
    """MiB of this process, which draws in one step."""
    torch.set_num_threads(1)
    drawing(shipped(side, folder), replace(scale, sampler=1))()
    return resident()


def drawn(folder: Path, scale: Scale, run: Callable[..., Any]) -> Iterator[str]:
    """Lines of Markdown. `run` calls a function in a process of its own."""
    pack(folder)
    peaks = {side: run(peak, side, folder, scale) for side in SIDES}
    pipelines = {side: shipped(side, folder) for side in SIDES}
    times = in_turn({side: drawing(own, scale) for side, own in pipelines.items()}, scale.repeats, CPU)
    columns = ("s, median", "least", "peak of the process, MiB", "weights, MB")
    yield from head(f"{scale.prompts} images in {scale.sampler} steps", *columns)
    for side, own in times.items():
        yield row(side, *seconds(own), f"{peaks[side]:.0f}", f"{size(pipelines[side].dit) / 1e6:.1f}")


def seconds(ms: Sequence[float]) -> tuple[str, str]:
    return f"{median(ms) / 1000:.3f}", f"{min(ms) / 1000:.3f}"


@torch.no_grad()
def called(folder: Path, scale: Scale) -> Iterator[str]:
    """The same of a call of the full-size model with guidance."""
    torch.manual_seed(0)
    dit: Any = nn.Module.to(published.build(scale.model, num_layers=scale.layers), scale.dtype)
    dit.save_pretrained(folder / WHOLE)
    own = {side: read(PixArtTransformer2DModel, folder / WHOLE, scale.dtype) for side in (WHOLE, SIMULATED)}
    simulate_(own[SIMULATED], W4A8)
    save_packed(dit, W4A8, folder / PACKED)
    own[PACKED] = read(PixArtTransformer2DModel, folder / PACKED, scale.dtype)
    calls = {side: steps.step(dit, 1, steps.Scale(dtype=scale.dtype), CPU) for side, dit in own.items()}
    same = calls[SIMULATED]().equal(calls[PACKED]())
    times = in_turn(calls, scale.repeats, CPU)
    count = published.PUBLISHED[scale.model][1]["num_layers"]
    what = f"a call of {scale.model}, {scale.layers} of {count} blocks, {scale.dtype}"
    yield from head(what, "s, median", "least", "weights, MB")
    for side, found in times.items():
        yield row(side, *seconds(found), f"{size(own[side]) / 1e6:.1f}")
    yield ""
    yield f"Packed and simulated answer {'the same, to the bit' if same else 'differently'}."
