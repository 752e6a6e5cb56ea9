"""Measure a full-size PixArt-Sigma on one GPU: steps and images in 16 bits, float8 and packed.

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
from benchmarks.adaround import measure_peak_mib
from benchmarks.packing import W4A6, W4A6_ROWS, W4A8, W4A16, load_transformer, save_packed
from benchmarks.profiles import PARTS, REST, profile_shares
from benchmarks.timing import (
    compute_medians,
    count_tensor_bytes,
    format_header,
    format_row,
    peak_memory_mib,
    time_in_turn,
)
from fp4dit.packed.export import count_state_bytes
from fp4dit.packed.nn.expanded_backend import expand_weights_

BF16, COMPILED, TORCHAO = "bf16", "bf16 compiled", "torchao float8 compiled"
ROWS = "W4A6, a scale a row"
FOLDERS = {"W4A8": W4A8, "W4A6": W4A6, "W4A16": W4A16, ROWS: W4A6_ROWS}
FASTER, BYTES = 1.25, 0.29  # required speed relative to compiled bf16, and bytes to bf16
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Variant:
    """What is compared with the others.

    Args:
        folder: the folder of the model.
        compiled: compile it.
        prepare_: changes the loaded model in place before.
        product: how it multiplies on a GPU of sm_89 or sm_90.
    """

    folder: str
    product: str
    compiled: bool = False
    prepare_: Callable[[nn.Module], object] | None = None


def quantize_to_float8_(dit: nn.Module) -> None:
    """Quantize weights and activations to E4M3 per channel and per token with torchao, in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(dit, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


VARIANTS = {
    BF16: Variant(BF16, "bf16"),
    COMPILED: Variant(BF16, "bf16", compiled=True),
    TORCHAO: Variant(BF16, "FP8", compiled=True, prepare_=quantize_to_float8_),
    "W4A8": Variant("W4A8", "FP8"),
    "W4A6": Variant("W4A6", "INT8"),
    "W4A16": Variant("W4A16", "bf16, expanded in registers"),
    "W4A8 compiled": Variant("W4A8", "FP8", compiled=True),
    "W4A6 compiled": Variant("W4A6", "INT8", compiled=True),
    "W4A6 expanded once, compiled": Variant(
        ROWS, "INT8 of cuBLAS", compiled=True, prepare_=expand_weights_
    ),
}


def compile_blocks_(dit: Any) -> None:
    """Compile the blocks of a transformer in place. They are equal, so that one is compiled."""
    for block in dit.transformer_blocks:
        block.compile(fullgraph=True)


@dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark."""

    model: str = "pixart_sigma"
    tokens: int = 300
    batches: tuple[int, ...] = (1, 4)
    sampler: int = 20
    repeats: int = 10
    images: int = 2
    dtype: torch.dtype = torch.bfloat16
    compile_: Callable[[nn.Module], object] = compile_blocks_


@dataclass(frozen=True)
class VariantResult:
    """Result of a variant for one batch size.

    Attributes:
        step: Milliseconds of a step.
        image: Milliseconds of an image.
        peak: Peak MiB of the device during a step.
        relative_error: Relative difference of the output from that of bf16.
    """

    step: float
    image: float
    peak: float
    relative_error: float


@dataclass(frozen=True)
class LoadingResult:
    """Result of `from_pretrained`.

    Attributes:
        seconds: Seconds that it takes.
        peak: Peak MiB of memory beyond those before.
        bytes: Bytes of the loaded weights.
    """

    seconds: float
    peak: float
    bytes: int


def save_models(folder: Path, scale: Scale) -> None:
    """Save a random model, and the same packed."""
    torch.manual_seed(0)
    dit: Any = nn.Module.to(published.build_random_transformer(scale.model), scale.dtype)
    dit.save_pretrained(folder / BF16)
    for name, rules in FOLDERS.items():
        dit = load_transformer(PixArtTransformer2DModel, folder / BF16, scale.dtype)
        save_packed(dit, rules, folder / name)


def load_variants(folder: Path, scale: Scale, device: torch.device) -> dict[str, nn.Module]:
    """Return the variants that `device` supports by name."""
    dits = {}
    for name, variant in VARIANTS.items():
        if name == TORCHAO and device.type != "cuda":
            continue
        dit = load_transformer(PixArtTransformer2DModel, folder / variant.folder, scale.dtype)
        dits[name] = dit.to(device)
        if variant.prepare_:
            variant.prepare_(dit)
        if variant.compiled:
            scale.compile_(dit)
    return dits


def draw_texts(dit: Any, rows: int, scale: Scale, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random text embeddings and their mask."""
    embeds = torch.randn(
        rows, scale.tokens, dit.config.caption_channels, device=device, dtype=scale.dtype
    )
    return embeds, torch.ones(rows, scale.tokens, dtype=torch.long, device=device)


def make_step(dit: Any, batch: int, scale: Scale, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that calls the transformer with guidance."""
    torch.manual_seed(0)
    rows, side = 2 * batch, dit.config.sample_size
    embeds, mask = draw_texts(dit, rows, scale, device)
    latent = torch.randn(rows, dit.config.in_channels, side, side, device=device, dtype=scale.dtype)
    arguments = {
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask,
        "return_dict": False,
    }
    arguments |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return lambda: dit(latent, timestep=torch.full((rows,), 500, device=device), **arguments)[0]


def make_sampling(dit: Any, batch: int, scale: Scale, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that runs all steps of the sampler, up to the latent."""
    pipe: Any = PixArtSigmaPipeline(None, None, None, dit, DPMSolverMultistepScheduler())  # pyright: ignore
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = draw_texts(dit, batch, scale, device)
    arguments = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "use_resolution_binning": False,
    }
    arguments |= {
        "negative_prompt_embeds": torch.zeros_like(embeds),
        "negative_prompt_attention_mask": mask,
    }
    options = {
        "negative_prompt": None,
        "num_inference_steps": scale.sampler,
        "output_type": "latent",
    }
    return lambda: pipe(**arguments, **options).images


@torch.no_grad()
def measure_variants(
    dits: Mapping[str, nn.Module], batch: int, scale: Scale, device: torch.device
) -> dict[str, VariantResult]:
    """Return the results of all variants for one batch size."""
    steps = {name: make_step(dit, batch, scale, device) for name, dit in dits.items()}
    images = {name: make_sampling(dit, batch, scale, device) for name, dit in dits.items()}
    step_ms = compute_medians(time_in_turn(steps, scale.repeats, device))
    image_ms = compute_medians(time_in_turn(images, scale.images, device))
    expected = steps[BF16]().float()
    errors, peaks = {}, {}
    for name, run_step in steps.items():
        difference = run_step().float() - expected
        errors[name] = (difference.norm() / expected.norm()).item()
    for name, run_step in steps.items():
        weights = count_tensor_bytes(dits[name]) / 2**20
        peaks[name] = weights + measure_extra_mib(run_step, device)
    return {
        name: VariantResult(step_ms[name], image_ms[name], peaks[name], errors[name])
        for name in dits
    }


def measure_extra_mib(call: Callable[[], object], device: torch.device) -> float:
    """Return the MiB of device memory that a call takes beyond those before it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) / 2**20
    call()
    return measure_peak_mib(device) - before


def measure_loading(folder: Path, dtype: torch.dtype) -> LoadingResult:
    """Return the time and memory to load a folder."""
    before, start = peak_memory_mib(), time.perf_counter()
    dit = load_transformer(PixArtTransformer2DModel, folder, dtype)
    return LoadingResult(
        time.perf_counter() - start, peak_memory_mib() - before, count_state_bytes(dit)
    )


def format_loading_table(folder: Path, scale: Scale, run: Callable[..., Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table about loading.

    `run` calls a function in a process of its loading.
    """
    yield from format_header(
        scale.model, "weights, MB", "of bf16", "read in, s", "MiB of memory for that"
    )
    results = {name: run(measure_loading, folder / name, scale.dtype) for name in (BF16, *FOLDERS)}
    for name, loading in results.items():
        share = f"{loading.bytes / results[BF16].bytes:.3f}"
        yield format_row(
            name,
            f"{loading.bytes / 1e6:.1f}",
            share,
            f"{loading.seconds:.1f}",
            f"{loading.peak:.0f}",
        )
    yield from ("", f"Asked are at most {BYTES} of the bytes of bf16.")


def format_step_tables(folder: Path, scale: Scale, device: torch.device | None) -> Iterator[str]:
    """Yield the lines of the Markdown tables; without a device, they have placeholders."""
    dits = load_variants(folder, scale, device) if device else {}
    for batch in scale.batches:
        results = measure_variants(dits, batch, scale, device) if device else {}
        yield from ("", *format_comparison(results, batch, scale))
    yield from ("", *format_header(f"of a step, batch {scale.batches[0]}", *PARTS, REST))
    for name in VARIANTS:
        cells = [UNKNOWN] * (len(PARTS) + 1)
        if device and name in dits:
            run_step = make_step(dits[name], scale.batches[0], scale, device)
            shares = profile_shares(run_step, device)
            cells = [f"{shares[part]:.0%}" for part in (*PARTS, REST)]
        yield format_row(name, *cells)


def format_comparison(
    results: Mapping[str, VariantResult], batch: int, scale: Scale
) -> Iterator[str]:
    """Yield the lines of the table that compares the variants for one batch size."""
    config = published.PUBLISHED[scale.model][1]
    rows = 2 * batch * (config["sample_size"] // config["patch_size"]) ** 2
    speed = ("step, ms", "times the speed of bf16 compiled", "of torchao")
    columns = ("products", *speed, f"{scale.sampler} steps, s", "peak, MiB", "apart from bf16")
    yield from format_header(f"batch {batch} with guidance, {rows} rows", *columns)
    for name, variant in VARIANTS.items():
        yield format_row(name, variant.product, *format_cells(results, name))
    yield from (
        "",
        f"Asked of ours are at least {FASTER} times the speed of bf16 compiled, "
        "and that of torchao.",
    )


def format_cells(results: Mapping[str, VariantResult], name: str) -> list[str]:
    """Return the cells of a variant's row."""
    if name not in results:
        return [UNKNOWN] * 6
    result = results[name]
    faster = [
        f"{results[other].step / result.step:.2f}" if other in results else UNKNOWN
        for other in (COMPILED, TORCHAO)
    ]
    return [
        f"{result.step:.1f}",
        *faster,
        f"{result.image / 1000:.2f}",
        f"{result.peak:.0f}",
        f"{result.relative_error:.4f}",
    ]
