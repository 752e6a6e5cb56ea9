"""A full-size PixArt-Sigma on one GPU: a step and an image, in 16 bits, in torchao's float8, and packed.

Weights and texts are random. The autoencoder is left out.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from benchmarks import published
from benchmarks.adaround import peak
from benchmarks.markdown import head, row
from benchmarks.packing import W4A6, W4A8, read, save_packed
from benchmarks.profiles import PARTS, REST, shares
from benchmarks.timing import in_turn, medians, resident
from fp4dit.packed.export import size

BF16, COMPILED, TORCHAO = "bf16", "bf16 compiled", "torchao float8 compiled"
FOLDERS = {"W4A8": W4A8, "W4A6": W4A6}
OURS = ("W4A8", "W4A6", "W4A8 compiled")
ALL = (BF16, COMPILED, TORCHAO, *OURS)
FASTER, BYTES = 1.25, 0.29  # than bf16 compiled, and of bf16: what is asked
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Scale:
    """What is measured."""

    model: str = "pixart_sigma"
    tokens: int = 300
    batches: tuple[int, ...] = (1, 4)
    sampler: int = 20
    repeats: int = 10
    images: int = 3
    dtype: torch.dtype = torch.bfloat16
    compile: Callable[[nn.Module], Any] = torch.compile


@dataclass(frozen=True)
class Side:
    """Of one batch: milliseconds of a step and of an image, MiB of the device that a step takes at most, and how far
    its answer is from that of bf16, relative to it."""

    step: float
    image: float
    peak: float
    apart: float


@dataclass(frozen=True)
class Reading:
    """`from_pretrained`: its seconds, MiB of memory more than before, and the bytes that are there then."""

    seconds: float
    peak: float
    bytes: int


def save(folder: Path, scale: Scale) -> None:
    """The model at random, and the same packed."""
    torch.manual_seed(0)
    dit: Any = nn.Module.to(published.build(scale.model), scale.dtype)
    dit.save_pretrained(folder / BF16)
    for name, rules in FOLDERS.items():
        save_packed(read(PixArtTransformer2DModel, folder / BF16, scale.dtype), rules, folder / name)


def sides(folder: Path, scale: Scale, device: torch.device) -> dict[str, nn.Module]:
    """Those that can be had on the device."""
    dits = {name: read(PixArtTransformer2DModel, folder / name, scale.dtype).to(device) for name in (BF16, *FOLDERS)}
    dits |= {COMPILED: scale.compile(dits[BF16]), "W4A8 compiled": scale.compile(dits["W4A8"])}
    if device.type == "cuda":
        dits[TORCHAO] = scale.compile(float8(read(PixArtTransformer2DModel, folder / BF16, scale.dtype).to(device)))
    return dits


def float8(dit: nn.Module) -> nn.Module:
    """Weights and activations in E4M3, a scale for each row and each token, in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(dit, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return dit


def texts(dit: Any, rows: int, scale: Scale, device: torch.device) -> tuple[Tensor, Tensor]:
    embeds = torch.randn(rows, scale.tokens, dit.config.caption_channels, device=device, dtype=scale.dtype)
    return embeds, torch.ones(rows, scale.tokens, dtype=torch.long, device=device)


def step(dit: Any, batch: int, scale: Scale, device: torch.device) -> Callable[[], Tensor]:
    """A call of the transformer, with guidance."""
    torch.manual_seed(0)
    rows, side = 2 * batch, dit.config.sample_size
    embeds, mask = texts(dit, rows, scale, device)
    latent = torch.randn(rows, dit.config.in_channels, side, side, device=device, dtype=scale.dtype)
    given = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "return_dict": False}
    given |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return lambda: dit(latent, timestep=torch.full((rows,), 500, device=device), **given)[0]


def image(dit: Any, batch: int, scale: Scale, device: torch.device) -> Callable[[], Tensor]:
    """All steps of the sampler, up to the latent."""
    pipe: Any = PixArtSigmaPipeline(None, None, None, dit, DPMSolverMultistepScheduler())  # pyright: ignore
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = texts(dit, batch, scale, device)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "use_resolution_binning": False}
    given |= {"negative_prompt_embeds": torch.zeros_like(embeds), "negative_prompt_attention_mask": mask}
    options = {"negative_prompt": None, "num_inference_steps": scale.sampler, "output_type": "latent"}
    return lambda: pipe(**given, **options).images


@torch.no_grad()
def measure(dits: Mapping[str, nn.Module], batch: int, scale: Scale, device: torch.device) -> dict[str, Side]:
    steps = {name: step(dit, batch, scale, device) for name, dit in dits.items()}
    images = {name: image(dit, batch, scale, device) for name, dit in dits.items()}
    step_ms = medians(in_turn(steps, scale.repeats, device))
    image_ms = medians(in_turn(images, scale.images, device))
    wanted = steps[BF16]().float()
    apart = {name: ((way().float() - wanted).norm() / wanted.norm()).item() for name, way in steps.items()}
    peaks = {name: size(dits[name]) / 2**20 + more(way, device) for name, way in steps.items()}
    return {name: Side(step_ms[name], image_ms[name], peaks[name], apart[name]) for name in dits}


def more(way: Callable[[], object], device: torch.device) -> float:
    """MiB of the device's memory that a call takes above what is there before it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) / 2**20
    way()
    return peak(device) - before


def reading(folder: Path, dtype: torch.dtype) -> Reading:
    before, began = resident(), time.perf_counter()
    dit = read(PixArtTransformer2DModel, folder, dtype)
    return Reading(time.perf_counter() - began, resident() - before, size(dit))


def readings(folder: Path, scale: Scale, run: Callable[..., Any]) -> Iterator[str]:
    """Lines of Markdown, on any machine. `run` calls a function in a process of its own."""
    yield from head(scale.model, "weights, MB", "of bf16", "read in, s", "MiB of memory for that")
    found = {name: run(reading, folder / name, scale.dtype) for name in (BF16, *FOLDERS)}
    for name, own in found.items():
        share = f"{own.bytes / found[BF16].bytes:.3f}"
        yield row(name, f"{own.bytes / 1e6:.1f}", share, f"{own.seconds:.1f}", f"{own.peak:.0f}")
    yield from ("", f"Asked are at most {BYTES} of the bytes of bf16.")


def table(folder: Path, scale: Scale, device: torch.device | None) -> Iterator[str]:
    """Lines of Markdown; without a device, what would stand in them."""
    dits = sides(folder, scale, device) if device else {}
    for batch in scale.batches:
        found = measure(dits, batch, scale, device) if device else {}
        yield from ("", *compared(found, batch, scale))
    yield from ("", *head(f"of a step, batch {scale.batches[0]}", *PARTS, REST))
    for name in ALL:
        own = shares(step(dits[name], scale.batches[0], scale, device), device) if device and name in dits else {}
        yield row(name, *(f"{own[part]:.0%}" if own else UNKNOWN for part in (*PARTS, REST)))


def compared(found: Mapping[str, Side], batch: int, scale: Scale) -> Iterator[str]:
    config = published.PUBLISHED[scale.model][1]
    rows = 2 * batch * (config["sample_size"] // config["patch_size"]) ** 2
    speed = ("step, ms", "times the speed of bf16 compiled", "of torchao")
    columns = (*speed, f"{scale.sampler} steps, s", "peak, MiB", "apart from bf16")
    yield from head(f"batch {batch} with guidance, {rows} rows", *columns)
    for name in ALL:
        yield row(name, *cells(found, name))
    yield from ("", f"Asked of ours are at least {FASTER} times the speed of bf16 compiled, and that of torchao.")


def cells(found: Mapping[str, Side], name: str) -> list[str]:
    if name not in found:
        return [UNKNOWN] * 6
    own = found[name]
    faster = [f"{found[other].step / own.step:.2f}" if other in found else UNKNOWN for other in (COMPILED, TORCHAO)]
    return [f"{own.step:.1f}", *faster, f"{own.image / 1000:.2f}", f"{own.peak:.0f}", f"{own.apart:.4f}"]
