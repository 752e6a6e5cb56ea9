"""Compare a model in full precision, simulated, packed, and quantized by SDNQ on a CPU.

Images of the shipped model and calls of a part of a full-size model are timed.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from benchmarks import published, steps
from benchmarks.adaround import CPU
from benchmarks.packing import (
    NVFP4_W4A4,
    NVFP4_W4A16,
    RTN_FP4,
    RTN_FP4_A6,
    W4A6,
    W8A8,
    RulePair,
    load_transformer,
    quantize_to_nearest_,
    save_packed,
)
from benchmarks.timing import format_header, format_row, peak_memory_mib, time_in_turn
from fp4dit.data.prompts import get_texts
from fp4dit.models.pixart import PixArt
from fp4dit.packed.export import count_state_bytes, pack_transformer_
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions

SHIPPED = PixArt("pkg://fp4dit/worlds/shapes/weights", tokens=20)
WHOLE, SIMULATED = "full precision", "W4A8, simulated"
# The sides that are packed, by what they quantize.
PACKED_DRAWING = {
    "W4A8": RTN_FP4,
    "W4A6": RTN_FP4_A6,
    "W4A4": NVFP4_W4A4,
    "W8A8": W8A8,
    "W4A16": NVFP4_W4A16,
}
PACKED_CALLS = {"W4A8": RTN_FP4, "W4A6": RTN_FP4_A6, "W4A6, attention in 16 bits": W4A6}
SPEED = "times the speed of full precision"
SDNQ = "SDNQ, INT8 products"  # of a token and a row: its fastest kind on a CPU
SIDES = (WHOLE, SIMULATED, *PACKED_DRAWING, SDNQ)


@dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark.

    Args:
        prompts: images that the shipped model draws.
        sampler: steps of the sampler.
        model: the full-size model.
        layers: its number of blocks.
        peers: folder of SDNQ.
    """

    prompts: int = 8
    sampler: int = 20
    repeats: int = 5
    model: str = "pixart_sigma_512"
    layers: int = 2
    dtype: torch.dtype = torch.bfloat16
    peers: str = "outputs/peers"


def save_packed_pipeline(rules: RulePair, folder: Path) -> None:
    """Save the shipped pipeline with a packed transformer, as the export stage does."""
    pipeline: Any = SHIPPED.load()
    pack_transformer_(pipeline.transformer, *quantize_to_nearest_(pipeline.transformer, rules))
    pipeline.save(folder, "shapes")


def load_shipped(side: str, folder: Path) -> Any:
    """Load the shipped pipeline: plain, quantized now, or packed from a folder of this name."""
    if side in PACKED_DRAWING:
        return replace(SHIPPED, path=str(folder / side)).load()
    pipeline = SHIPPED.load()
    if side == SIMULATED:
        quantize_to_nearest_(pipeline.transformer, RTN_FP4)
    if side == SDNQ:
        quantize_by_sdnq_(pipeline.transformer)
    return pipeline


def quantize_by_sdnq_(transformer: nn.Module) -> None:
    """Quantize all layers of the blocks by SDNQ, with INT8 products, in place."""
    with redirect_stdout(sys.stderr):
        from sdnq.quantizer import sdnq_post_load_quant  # pyright: ignore[reportMissingImports]

        sdnq_post_load_quant(
            transformer,
            weights_dtype="int8",
            use_quantized_matmul=True,
            quantization_device="cpu",
            return_device="cpu",
        )


def make_draw(pipeline: Any, scale: Scale) -> Callable[[], object]:
    """Return a function that draws the images."""
    captions = draw_captions(scale.prompts, ShapesWorld(), held_out=True)
    prompts = [str(prompt) for prompt in get_texts(captions)]
    return lambda: pipeline.sample(prompts, range(scale.prompts), scale.sampler, 4.5)


def measure_draw_peak(side: str, folder: Path, scale: Scale) -> float:
    """Draw in one step, and return the peak memory of this process in MiB."""
    sys.path.append(scale.peers)
    torch.set_num_threads(1)
    make_draw(load_shipped(side, folder), replace(scale, sampler=1))()
    return peak_memory_mib()


def report_drawing(folder: Path, scale: Scale, run: Callable[..., Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table on drawing with the shipped model.

    Args:
        run: a function that calls another function in a process of its own.
    """
    for side, rules in PACKED_DRAWING.items():
        save_packed_pipeline(rules, folder / side)
    sys.path.append(scale.peers)
    sides = SIDES if find_spec("sdnq") else SIDES[:-1]
    peaks = {side: run(measure_draw_peak, side, folder, scale) for side in sides}
    pipelines = {side: load_shipped(side, folder) for side in sides}
    draws = {side: make_draw(pipeline, scale) for side, pipeline in pipelines.items()}
    columns = ("s, median", "least", SPEED, "peak of the process, MiB", "weights, MB")
    yield from format_header(f"{scale.prompts} images in {scale.sampler} steps", *columns)
    times = time_in_turn(draws, scale.repeats, CPU)
    for side in sides:
        megabytes = count_state_bytes(pipelines[side].transformer) / 1e6
        seconds = format_seconds(times[side], times[WHOLE])
        yield format_row(side, *seconds, f"{peaks[side]:.0f}", f"{megabytes:.1f}")
    if SDNQ not in sides:
        yield f"\nSDNQ is missing: pip install --no-deps --target {scale.peers} sdnq"


def format_seconds(ms: Sequence[float], whole: Sequence[float]) -> tuple[str, str, str]:
    """Return the median and the least of several times in seconds, and the speed.

    The speed is that of full precision times a number, by the least times.
    """
    return f"{median(ms) / 1000:.3f}", f"{min(ms) / 1000:.3f}", f"{min(whole) / min(ms):.2f}"


@torch.no_grad()
def report_calls(folder: Path, scale: Scale) -> Iterator[str]:
    """Yield the lines of a Markdown table on calls of the full-size model with guidance."""
    models = make_full_size_models(folder, scale)
    calls = {}
    for side, model in models.items():
        calls[side] = steps.make_step(model, 1, steps.Scale(dtype=scale.dtype), CPU)
    count = published.PUBLISHED[scale.model][1]["num_layers"]
    title = f"a call of {scale.model}, {scale.layers} of {count} blocks, {scale.dtype}"
    yield from format_header(title, "s, median", "least", SPEED, "weights, MB")
    times = time_in_turn(calls, scale.repeats, CPU)
    for side, model in models.items():
        megabytes = count_state_bytes(model) / 1e6
        yield format_row(side, *format_seconds(times[side], times[WHOLE]), f"{megabytes:.1f}")


def make_full_size_models(folder: Path, scale: Scale) -> dict[str, nn.Module]:
    """Build a random full-size model, and load it plain, simulated and packed."""
    torch.manual_seed(0)
    built = published.build_random_transformer(scale.model, num_layers=scale.layers)
    dit: Any = nn.Module.to(built, scale.dtype)
    dit.save_pretrained(folder / WHOLE)
    models = {}
    for side in (WHOLE, SIMULATED):
        models[side] = load_transformer(PixArtTransformer2DModel, folder / WHOLE, scale.dtype)
    quantize_to_nearest_(models[SIMULATED], RTN_FP4)
    for side, rules in PACKED_CALLS.items():
        packed: Any = load_transformer(PixArtTransformer2DModel, folder / WHOLE, scale.dtype)
        save_packed(packed, rules, folder / side)
        models[side] = load_transformer(PixArtTransformer2DModel, folder / side, scale.dtype)
    return models
