"""Measure linear layers with low-bit training beside plain bf16 ones.

Run `python -m benchmarks.bench_training`. It uses PixArt's shapes, 1024 tokens, random data and
bf16 weights, on a GPU if there is one, else on one core. All layers take turns in one run, and the
medians of the repeats count. `kept` is what the forward pass keeps for the backward pass, `peak`
what a forward and a backward pass take beyond what was there before: gradients, and all
intermediate values. The tables go to outputs/benchmarks/training.md. The first line says whether
FP4 products are emulated; if so, the times are those of the emulation, on a GPU with fused and with
unfused quantization of the operands. The last table has the passes of a whole model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.adaround import CPU, measure_peak_mib
from benchmarks.gpu import run_in_process
from benchmarks.timing import (
    compute_medians,
    format_header,
    format_row,
    get_device_name,
    peak_memory_mib,
    time_in_turn,
)
from fp4dit.lowbit_training import scaled_mm, triton_ops
from fp4dit.lowbit_training.linear import TrainRule, make_low_bit
from fp4dit.lowbit_training.matmul import MatmulRecipe
from fp4dit.lowbit_training.operand_quant import absmax_quantizer, mxfp8_quantizer, nvfp4_quantizer
from fp4dit.pretraining import Batch, SceneStream
from fp4dit.pretraining.denoising import DenoisingTask
from fp4dit.pretraining.recipe import train_transformer
from fp4dit.worlds import ShapesWorld

UNFUSED = (
    "Quartet, projections not fused"  # Only on a GPU, because no other device has the fused kernel.
)
OUT = Path("outputs/benchmarks/training.md")
PLAIN = "plain, bf16"
RECIPES = {
    "Quartet": MatmulRecipe(),
    "Quartet, plain gradients": MatmulRecipe(backward=None),
    "MXFP8": MatmulRecipe(mxfp8_quantizer(), mxfp8_quantizer()),
    "MXFP4, stochastic gradients": MatmulRecipe(
        absmax_quantizer(), absmax_quantizer(stochastic=True)
    ),
    "NVFP4, MXFP4 gradients": MatmulRecipe(nvfp4_quantizer()),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; `shapes` are those of weights, out x in."""

    shapes: Sequence[tuple[int, int]] = ((1152, 1152), (4608, 1152), (1152, 4608))
    tokens: int = 1024
    repeats: int = 5
    calls: int = 1
    scenes: int = 8
    layers: int = 6


def list_variants(device: torch.device) -> list[str]:
    """Return the names of the layers that `device` supports."""
    return [PLAIN, *RECIPES, *([UNFUSED] if device.type == "cuda" else [])]


def find_recipe(name: str) -> MatmulRecipe:
    """Return the recipe of a layer."""
    return RECIPES["Quartet" if name == UNFUSED else name]


def make_layer(name: str, o: int, k: int, device: torch.device) -> nn.Linear:
    """Return a random layer of o output and k input channels."""
    torch.manual_seed(0)
    plain = nn.Linear(k, o, device=device, dtype=torch.bfloat16)
    return plain if name == PLAIN else make_low_bit(plain, find_recipe(name))


def select_kernels(name: str) -> Any:
    """Return a context manager that selects the kernels for a layer."""
    if name != UNFUSED:
        return nullcontext()
    return patch.object(triton_ops, "make_kernel_config", lambda quantizer: None)


def run_both_passes(module: nn.Linear, x: Tensor, slope: Tensor) -> None:
    """Run a forward and a backward pass."""
    module.zero_grad(set_to_none=True)
    torch.autograd.grad(module(x), [x, *module.parameters()], slope)


def make_operands(o: int, k: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a random input and a random gradient of the output."""
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16).requires_grad_()
    return x, torch.randn(tokens, o, device=device, dtype=torch.bfloat16)


def time_passes(
    sizes: Sizes, o: int, k: int, device: torch.device
) -> Mapping[str, tuple[float, float]]:
    """Return the milliseconds of a forward and of a backward pass by layer.

    Those of the backward pass are the difference of both passes and the forward pass.
    """
    x, grad = make_operands(o, k, sizes.tokens, device)
    layers = {name: make_layer(name, o, k, device) for name in list_variants(device)}

    def run_forward(name: str) -> None:
        with select_kernels(name):
            layers[name](x)

    def run_both(name: str) -> None:
        with select_kernels(name):
            run_both_passes(layers[name], x, grad)

    calls: dict[Any, Callable[[], None]] = {}
    for name in layers:
        calls[name, "forward"] = partial(run_forward, name)
    for name in layers:
        calls[name, "both"] = partial(run_both, name)
    medians = compute_medians(time_in_turn(calls, sizes.repeats, device, sizes.calls))
    times = {}
    for name in layers:
        forward, both = medians[name, "forward"], medians[name, "both"]
        times[name] = (forward, both - forward)
    return times


def measure_memory(
    name: str, o: int, k: int, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Return the MiB that are kept for the backward pass, and those at the peak.

    It needs a process of its own, because the peak of a process never falls.
    """
    torch.set_num_threads(1)

    def read_peak() -> float:
        return measure_peak_mib(device) if device.type == "cuda" else peak_memory_mib()

    x, grad = make_operands(8, 8, 64, device)
    run_both_passes(make_layer(name, 8, 8, device), x, grad)  # The first call loads libraries.
    x, grad = make_operands(o, k, tokens, device)
    module = make_layer(name, o, k, device)
    saved_bytes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = read_peak()
    with saved_tensors_hooks(record, lambda tensor: tensor), select_kernels(name):
        run_both_passes(module, x, grad)
    for p in module.parameters():  # Parameters exist in any case.
        saved_bytes.pop(p.untyped_storage().data_ptr(), None)
    return sum(saved_bytes.values()) / 2**20, read_peak() - before


def format_layer_table(
    sizes: Sizes, device: torch.device, run: Callable[..., Any] = run_in_process
) -> Iterator[str]:
    """Yield the lines of a Markdown table of single layers."""
    why = scaled_mm.explain_unsupported(device)
    how = f"emulated: {why}" if why else "block-scaled"
    yield (
        f"{get_device_name(device)}, torch {torch.__version__}, {sizes.tokens} tokens; "
        f"MXFP4 products {how}"
    )
    yield ""
    columns = ("forward, ms", "of plain", "backward, ms", "of plain", "kept, MiB", "peak, MiB")
    yield from format_header("o x k, layer", *columns)
    for o, k in sizes.shapes:
        times = time_passes(sizes, o, k, device)
        for name, pair in times.items():
            cells = []
            for ms, plain in zip(pair, times[PLAIN], strict=True):
                cells += [f"{ms:.2f}", f"{ms / plain:.1f}"]
            kept_mib, peak_mib = run(measure_memory, name, o, k, sizes.tokens, device)
            yield format_row(f"{o} x {k}, {name}", *cells, f"{kept_mib:.1f}", f"{peak_mib:.1f}")


def run_training_passes(task: DenoisingTask, batch: Batch, device: torch.device) -> None:
    """Run the forward and the backward pass of a step; the optimizer is the same for all."""
    task.zero_grad()
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        task.loss(task.transformer, batch).backward()


def format_model_table(sizes: Sizes, device: torch.device) -> Iterator[str]:
    """Yield the lines of a Markdown table of the shapes model with low-bit blocks."""
    batch = next(iter(SceneStream(ShapesWorld(), sizes.scenes)))
    batch = batch._replace(pictures=batch.pictures.to(device))
    settings: Any = {
        "lr": 0.0,
        "muon_lr": 0.0,
        "levels": 2,
        "drop": 0.0,
        "decay": 0.9,
        "further": False,
    }

    def task(name: str) -> DenoisingTask:
        rules = [] if name == PLAIN else [TrainRule("transformer_blocks.*", find_recipe(name))]
        return train_transformer(
            ShapesWorld(), 1, layers=sizes.layers, linear=rules, **settings
        ).to(device)

    tasks = {name: task(name) for name in list_variants(device)}

    def run_variant(name: str) -> None:
        with select_kernels(name):
            run_training_passes(tasks[name], batch, device)

    medians = compute_medians(
        time_in_turn({name: partial(run_variant, name) for name in tasks}, sizes.repeats, device)
    )
    yield from format_header(
        f"the shapes model, {sizes.scenes} scenes at 2 noise levels", "ms", "of plain"
    )
    for name, ms in medians.items():
        yield format_row(name, f"{ms:.0f}", f"{ms / medians[PLAIN]:.1f}")


def main(
    sizes: Sizes, device: torch.device, out: Path = OUT, run: Callable[..., Any] = run_in_process
) -> None:
    torch.set_num_threads(1)
    lines = []
    for text in chain(
        format_layer_table(sizes, device, run), [""], format_model_table(sizes, device)
    ):
        print(text, flush=True)
        lines.append(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    main(Sizes(calls=20) if gpu else Sizes(), torch.device("cuda") if gpu else CPU)
