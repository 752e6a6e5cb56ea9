"""What the same seed gives elsewhere, and what determinism costs: `python -m benchmarks.determinism [prompts]`.

An experiment of the demo is run whole, again and again, each time in surroundings that differ in one thing. Then the
shipped model draws eagerly and compiled; and drawing and learning take turns with what `deterministic` allows torch.
Runs have one thread unless it is said.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from benchmarks import adaround, cpu
from benchmarks.adaround import CPU
from benchmarks.markdown import head, row
from benchmarks.packing import RTN_FP4, simulate_
from benchmarks.timing import in_turn, medians
from fp4dit.store import read_manifest

EXPERIMENT = "demo_4_fp4dit_w4a8"
UNKNOWN = "not measured"
# Without AMX and AVX-512, as many laptops and servers of some years are.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Place:
    """Where an experiment is run: what differs, and whether it is there."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    there: bool = True


FIRST, *OTHERS = (
    Place("one thread"),
    Place("the same again"),
    Place("deterministic=off", options=["deterministic=off"]),
    Place("two threads", {"OMP_NUM_THREADS": "2"}),
    Place("AVX2, no products in bf16", AVX2),
    Place("a GPU", options=["trainer=gpu"], there=torch.cuda.is_available()),
)


def run(place: Place, options: Sequence[str], out: Path) -> Path:
    """Its store."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **place.environment}
    command = [sys.executable, "-m", "pipelines.run", f"experiment={EXPERIMENT}", f"outputs={out}", "progress=none"]
    subprocess.run([*command, *options, *place.options], env=own, check=True, stdout=subprocess.DEVNULL)
    return out / "store"


def made(store: Path, stage: str, kind: str) -> dict[str, str]:
    """Checksums of its files."""
    [manifest] = store.glob(f"{stage}/*/manifest.json")
    return {name: one["sha256"] for name, one in read_manifest(manifest.parent)["files"].items() if name.endswith(kind)}


def images(store: Path, stage: str) -> Tensor:
    """[n, height, width, 3] in 0..1."""
    found = [np.asarray(Image.open(path)) for path in sorted(store.glob(f"{stage}/*/images/*.png"))]
    return torch.from_numpy(np.stack(found)) / 255


def psnr(images: Tensor, others: Tensor) -> str:
    """The mean over those images that are not the same."""
    found = peak_signal_noise_ratio(images, others, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return f"{found[found.isfinite()].mean():.1f} dB"


def beside(store: Path, base: Path, stage: str, kind: str) -> str:
    own, others = made(store, stage, kind), made(base, stage, kind)
    same = sum(own[name] == others[name] for name in own)
    if same == len(own) or kind != ".png":
        return f"{same} of {len(own)} the same"
    return f"{same} of {len(own)} the same, others {psnr(images(store, stage), images(base, stage))}"


def digits(store: Path) -> str:
    """What a table says."""
    [scores] = store.glob("score/*/metrics.json")
    found = {name: one["mean"] for name, one in json.loads(scores.read_text())["metrics"].items()}
    return f"{found['psnr']:.2f} dB, {found['ssim']:.3f}, {100 * found['oracle']:.0f}, {found['clip']:.1f}"


def elsewhere(options: Sequence[str], folder: Path) -> Iterator[str]:
    kinds = {"reference": ".png", "reconstruct": ".safetensors", "generate": ".png"}
    columns = ("images, full precision", "units learnt", "images, quantized", "PSNR, SSIM, oracle, CLIP")
    yield from head(EXPERIMENT, *columns)
    base = run(FIRST, options, folder / "first")
    yield row(FIRST.name, *[""] * len(kinds), digits(base))
    for i, place in enumerate(OTHERS):
        if place.there:
            store = run(place, options, folder / str(i))
            yield row(place.name, *(beside(store, base, *one) for one in kinds.items()), digits(store))
        else:
            yield row(place.name, *[UNKNOWN] * len(columns))


WAYS: dict[str, Callable[[nn.Module], object]] = {"eager": lambda _: None, "compiled": lambda dit: dit.compile()}


def drawn(device: torch.device, way: str, quantized: bool) -> Tensor:
    pipeline = cpu.SHIPPED.load()
    if quantized:
        simulate_(pipeline.dit, RTN_FP4)
    pipeline.to(device)
    WAYS[way](pipeline.dit)
    found = cpu.drawing(pipeline, cpu.Scale())()
    assert isinstance(found, Tensor)
    return found.cpu()


def compiled() -> Iterator[str]:
    yield from head("8 images in 20 steps, beside eager on the CPU", "full precision", "FP4 to nearest, online A8")
    base = [drawn(CPU, "eager", quantized) for quantized in (False, True)]
    for name, way in (("CPU", "compiled"), ("GPU", "eager"), ("GPU", "compiled")):
        there = name == "CPU" or torch.cuda.is_available()
        device = torch.device("cpu" if name == "CPU" else "cuda")
        found = [psnr(drawn(device, way, bool(i)), base[i]) for i in (0, 1)] if there else [UNKNOWN, UNKNOWN]
        yield row(f"{way}, {name}", *found)


def cost(device: torch.device) -> Iterator[str]:
    """Of what is taken where it has to be, and of torch's way to find what nobody has written, which we leave out."""
    torch.manual_seed(0)
    pipeline = cpu.SHIPPED.load()
    pipeline.to(device)
    module = adaround.block(256).to(device).requires_grad_(True)
    call, target = adaround.example(adaround.examples(module, 256, 64, 16, device), 16, device)

    def learn() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            (call(module) - target).square().mean().backward()

    def set_to(mode: int, fill: bool, work: Callable[[], object]) -> Callable[[], object]:
        def way() -> None:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore
            work()

        return way

    modes = {"off": (0, False), "warn": (1, False), "on": (2, False), "on, memory filled": (2, True)}
    yield from head(f"ms on a {'GPU' if device.type == 'cuda' else 'core'}", *modes)
    for name, work in {"2 images in 5 steps": cpu.drawing(pipeline, cpu.Scale(2, 5)), "a block's pass": learn}.items():
        times = medians(in_turn({mode: set_to(*how, work) for mode, how in modes.items()}, 15, device))
        yield row(name, *(f"{ms:.1f}" for ms in times.values()))
    torch.set_deterministic_debug_mode(0)


def main(options: Sequence[str] = ()) -> Iterator[str]:
    torch.set_num_threads(1)
    yield from cost(CPU)
    if torch.cuda.is_available():
        yield from ("", *cost(torch.device("cuda")))
    yield from ("", *compiled(), "")
    with tempfile.TemporaryDirectory() as folder:
        yield from elsewhere(options, Path(folder))


if __name__ == "__main__":
    for line in main([f"prompts.count={count}" for count in sys.argv[1:]]):
        print(line, flush=True)
