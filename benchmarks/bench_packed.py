"""Compare packed weights with 16 bits and torchao: `python -m benchmarks.bench_packed`.

All sides take turns in one run, and medians of the repeats are printed. Weights and data are
random, the architectures are the published ones, and nothing is downloaded. On a CPU one core is
measured; a GPU is measured if there is one. The output is outputs/benchmarks/packed.md.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu, products, steps
from benchmarks.adaround import CPU
from benchmarks.gpu import run_in_process
from benchmarks.products import Sizes
from benchmarks.timing import get_device_name

OUT = Path("outputs/benchmarks")
HALF = (torch.bfloat16,)
SHIPPED = [(256, 256), (1024, 256), (256, 1024)]


@dataclass(frozen=True)
class Scale:
    """Sizes of all parts of the benchmark."""

    gpu_products: Sizes
    cpu_products: Sizes
    full_size: steps.Scale
    cpu: cpu.Scale


def full_scale() -> Scale:
    """Return the sizes of a complete run."""
    gpu_shapes = products.list_linear_shapes("pixart_sigma", "hunyuan")
    cpu_shapes = [*SHIPPED, *products.list_linear_shapes("pixart_sigma")]
    return Scale(
        Sizes(gpu_shapes, (16, 8192), HALF, repeats=10, calls=20),
        Sizes(cpu_shapes, (128, 1024), (torch.float32, *HALF), repeats=5, calls=1),
        steps.Scale(),
        cpu.Scale(),
    )


def report_packed(
    scale: Scale, device: torch.device | None, run: Callable[..., Any]
) -> Iterator[str]:
    """Yield the lines of the report in Markdown.

    Args:
        device: the GPU, if there is one.
        run: a function that calls another function in a process of its own.
    """
    yield from ("## CPU", "", f"{get_device_name(CPU)}, one core, torch {torch.__version__}", "")
    with tempfile.TemporaryDirectory() as folder:
        yield from cpu.report_drawing(Path(folder), scale.cpu, run)
    with tempfile.TemporaryDirectory() as folder:
        yield from ("", *cpu.report_calls(Path(folder), scale.cpu))
    on_cpu = list(products.measure_products(scale.cpu_products, CPU))
    yield from ("", *products.format_products(on_cpu, get_device_name(CPU)))
    with tempfile.TemporaryDirectory() as folder:
        steps.save_models(Path(folder), scale.full_size)
        yield from ("", *steps.format_loading_table(Path(folder), scale.full_size, run))
        yield from ("", "## GPU", "", get_device_name(device) if device else "There is none here.")
        yield from steps.format_step_tables(Path(folder), scale.full_size, device)
    yield ""
    if device is None:
        yield "Products: not measured."
        return
    on_gpu = list(products.measure_products(scale.gpu_products, device))
    yield from products.format_products(on_gpu, get_device_name(device))


def main(
    scale: Scale, device: torch.device | None, out: Path, run: Callable[..., Any] = run_in_process
) -> None:
    """Print the report, and write it to a folder.

    Args:
        device: the GPU, if there is one.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "packed.md", "w") as file:
        for line in report_packed(scale, device, run):
            print(line, flush=True)
            print(line, file=file)


if __name__ == "__main__":
    main(full_scale(), torch.device("cuda") if torch.cuda.is_available() else None, OUT)
