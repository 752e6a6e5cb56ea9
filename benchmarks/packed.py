"""Packed weights beside 16 bits and torchao: `python -m benchmarks.packed`, with a GPU if there is one.

All sides take turns in one run, and of the repeats medians count. Weights and data are random, the architectures true:
nothing is downloaded. On a CPU one core is measured. It writes outputs/benchmarks/packed.md and speeds.json beside it,
by which products choose their way. On a device that the package does not know yet, make it known:

    cp outputs/benchmarks/speeds.json fp4dit/packed/speeds.json

It keeps what is known of other devices.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu, products, steps
from benchmarks.adaround import CPU
from benchmarks.gpu import alone
from benchmarks.products import Product, Sizes
from fp4dit.packed.speeds import Speed, device_name, measured

OUT = Path("outputs/benchmarks")
HALF = (torch.bfloat16,)
SHIPPED = [(256, 256), (1024, 256), (256, 1024)]


@dataclass(frozen=True)
class Scale:
    """What is measured of each."""

    gpu_products: Sizes
    cpu_products: Sizes
    full_size: steps.Scale
    cpu: cpu.Scale


def full() -> Scale:
    return Scale(
        Sizes(products.shapes("pixart_sigma", "hunyuan"), (16, 8192), HALF, repeats=10, calls=20),
        Sizes([*SHIPPED, *products.shapes("pixart_sigma")], (128, 1024), (torch.float32, *HALF), repeats=5, calls=1),
        steps.Scale(),
        cpu.Scale(),
    )


def report(scale: Scale, device: torch.device | None, known: list[Product], run: Callable[..., Any]) -> Iterator[str]:
    """Lines of Markdown. Products measured on the best device there is are added to those known."""
    yield from ("## CPU", "", f"{device_name(CPU)}, one core, torch {torch.__version__}", "")
    with tempfile.TemporaryDirectory() as folder:
        yield from cpu.drawn(Path(folder), scale.cpu, run)
    with tempfile.TemporaryDirectory() as folder:
        yield from ("", *cpu.called(Path(folder), scale.cpu))
    on_cpu = list(products.measure(scale.cpu_products, CPU))
    yield from ("", *products.lines(on_cpu, device_name(CPU)))
    with tempfile.TemporaryDirectory() as folder:
        steps.save(Path(folder), scale.full_size)
        yield from ("", *steps.readings(Path(folder), scale.full_size, run))
        yield from ("", "## GPU", "", device_name(device) if device else "There is none here.")
        yield from steps.table(Path(folder), scale.full_size, device)
    on_gpu = list(products.measure(scale.gpu_products, device)) if device else []
    yield from ("", *(products.lines(on_gpu, device_name(device)) if device else ("Products: not measured.",)))
    known += on_gpu or on_cpu


def speeds(known: Sequence[Speed]) -> str:
    """JSON: what was measured now, and before on other devices."""
    devices = {speed.device for speed in known}
    rows = [speed for speed in measured() if speed.device not in devices] + list(known)
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main(scale: Scale, device: torch.device | None, out: Path, run: Callable[..., Any] = alone) -> None:
    """`device` is the GPU, if there is one."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    found: list[Product] = []
    with open(out / "packed.md", "w") as file:
        for text in report(scale, device, found, run):
            print(text, flush=True)
            print(text, file=file)
    (out / "speeds.json").write_text(speeds(products.speeds(found, device or CPU)))


if __name__ == "__main__":
    main(full(), torch.device("cuda") if torch.cuda.is_available() else None, OUT)
