"""Measure how results differ between environments, and the cost of determinism.

`python -m benchmarks.determinism [prompts]` runs a whole experiment of the demo several times, each
time in an environment that differs in one respect. It also compares eager with compiled images of
the shipped model, and times drawing and learning with each value of `deterministic`. Runs have one
thread unless their name says otherwise.
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
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from benchmarks import adaround, cpu
from benchmarks.adaround import CPU
from benchmarks.packing import RTN_FP4, quantize_to_nearest_
from benchmarks.timing import compute_medians, format_header, format_row, time_in_turn
from fp4dit.store.manifest import read_manifest

EXPERIMENT = "demo_4_fp4dit_w4a8"
UNKNOWN = "not measured"
# Environment of a CPU without AMX and AVX-512, as in many laptops and older servers.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True)
class Setting:
    """An environment in which the experiment runs.

    Attributes:
        name: Name of the row.
        environment: Environment variables.
        options: Overrides of the run.
        available: False if this machine lacks the device.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    available: bool = True


BASE, *VARIANTS = (
    Setting("one thread"),
    Setting("the same again"),
    Setting("deterministic=off", options=["deterministic=off"]),
    Setting("two threads", {"OMP_NUM_THREADS": "2"}),
    Setting("AVX2, no products in bf16", AVX2),
    Setting("a GPU", options=["trainer=gpu"], available=torch.cuda.is_available()),
)


def run_experiment(setting: Setting, options: Sequence[str], out: Path) -> Path:
    """Run the experiment in a setting, and return its store."""
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **threads, **setting.environment}
    command = [
        sys.executable,
        "-m",
        "pipelines.run",
        f"experiment={EXPERIMENT}",
        f"outputs={out}",
        "progress=none",
    ]
    subprocess.run(
        [*command, *options, *setting.options],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return out / "store"


def read_checksums(store: Path, stage: str, suffix: str) -> dict[str, str]:
    """Return the checksums of a stage's files with this suffix, by name."""
    [manifest] = store.glob(f"{stage}/*/manifest.json")
    checksums = {}
    for name, entry in read_manifest(manifest.parent)["files"].items():
        if name.endswith(suffix):
            checksums[name] = entry["sha256"]
    return checksums


def read_images(store: Path, stage: str) -> Tensor:
    """Return a stage's images in [0, 1], [n, height, width, 3]."""
    paths = sorted(store.glob(f"{stage}/*/images/*.png"))
    images = [np.asarray(Image.open(path)) for path in paths]
    return torch.from_numpy(np.stack(images)) / 255


def format_psnr(images: Tensor, others: Tensor) -> str:
    """Return the mean PSNR of the images that are not the same."""
    psnr = peak_signal_noise_ratio(images, others, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return f"{psnr[psnr.isfinite()].mean():.1f} dB"


def compare_files(store: Path, base: Path, stage: str, suffix: str) -> str:
    """Return how many files of a stage are the same in two stores, and the PSNR of other images."""
    checksums = read_checksums(store, stage, suffix)
    base_checksums = read_checksums(base, stage, suffix)
    same = sum(checksums[name] == base_checksums[name] for name in checksums)
    cell = f"{same} of {len(checksums)} the same"
    if same == len(checksums) or suffix != ".png":
        return cell
    return f"{cell}, others {format_psnr(read_images(store, stage), read_images(base, stage))}"


def format_scores(store: Path) -> str:
    """Return the scores of a run, as tables print them."""
    [path] = store.glob("score/*/metrics.json")
    metrics = json.loads(path.read_text())["metrics"]
    psnr, ssim = metrics["psnr"]["mean"], metrics["ssim"]["mean"]
    oracle, clip = metrics["oracle"]["mean"], metrics["clip"]["mean"]
    return f"{psnr:.2f} dB, {ssim:.3f}, {100 * oracle:.0f}, {clip:.1f}"


def compare_settings(options: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield a table of the files and scores of the experiment in each setting."""
    kinds = {"reference": ".png", "reconstruct": ".safetensors", "generate": ".png"}
    columns = (
        "images, full precision",
        "units learned",
        "images, quantized",
        "PSNR, SSIM, oracle, CLIP",
    )
    yield from format_header(EXPERIMENT, *columns)
    base = run_experiment(BASE, options, folder / "first")
    yield format_row(BASE.name, *[""] * len(kinds), format_scores(base))
    for i, setting in enumerate(VARIANTS):
        if not setting.available:
            yield format_row(setting.name, *[UNKNOWN] * len(columns))
            continue
        store = run_experiment(setting, options, folder / str(i))
        cells = [compare_files(store, base, stage, suffix) for stage, suffix in kinds.items()]
        yield format_row(setting.name, *cells, format_scores(store))


def draw_shipped_images(device: torch.device, is_compiled: bool, quantized: bool) -> Tensor:
    """Return images of the shipped model."""
    pipeline = cpu.SHIPPED.load()
    if quantized:
        quantize_to_nearest_(pipeline.transformer, RTN_FP4)
    pipeline.to(device)
    if is_compiled:
        pipeline.transformer.compile()
    images = cpu.make_draw(pipeline, cpu.Scale())()
    assert isinstance(images, Tensor)
    return images.cpu()


def compare_compiled() -> Iterator[str]:
    """Yield a table of the PSNR between compiled or GPU images and eager ones on the CPU."""
    yield from format_header(
        "8 images in 20 steps, beside eager on the CPU",
        "full precision",
        "FP4 to nearest, dynamic A8",
    )
    base = [draw_shipped_images(CPU, is_compiled=False, quantized=i == 1) for i in (0, 1)]
    for name, is_compiled in (("CPU", True), ("GPU", False), ("GPU", True)):
        cells = [UNKNOWN, UNKNOWN]
        if name == "CPU" or torch.cuda.is_available():
            device = torch.device("cpu" if name == "CPU" else "cuda")
            for i in (0, 1):
                cells[i] = format_psnr(draw_shipped_images(device, is_compiled, bool(i)), base[i])
        yield format_row(f"{'compiled' if is_compiled else 'eager'}, {name}", *cells)


def time_modes(device: torch.device) -> Iterator[str]:
    """Yield a table of times with each mode of torch's determinism.

    The last mode also fills uninitialized memory, as torch does by default. `deterministic=on` of
    the pipelines leaves that out.
    """
    torch.manual_seed(0)
    pipeline = cpu.SHIPPED.load()
    pipeline.to(device)
    module = adaround.make_block(256).to(device).requires_grad_(True)
    call, target = adaround.select_example(
        adaround.make_dataset(module, 256, 64, 16, device), 16, device
    )

    def learn() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            (call(module) - target).square().mean().backward()

    def with_mode(mode: int, fill: bool, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore
            work()

        return run

    modes = {
        "off": (0, False),
        "warn": (1, False),
        "on": (2, False),
        "on, memory filled": (2, True),
    }
    yield from format_header(f"ms on a {'GPU' if device.type == 'cuda' else 'core'}", *modes)
    for name, work in {
        "2 images in 5 steps": cpu.make_draw(pipeline, cpu.Scale(2, 5)),
        "a block's pass": learn,
    }.items():
        variants = {mode: with_mode(*flags, work) for mode, flags in modes.items()}
        times = compute_medians(time_in_turn(variants, 15, device))
        yield format_row(name, *(f"{ms:.1f}" for ms in times.values()))
    torch.set_deterministic_debug_mode(0)


def main(options: Sequence[str] = ()) -> Iterator[str]:
    torch.set_num_threads(1)
    yield from time_modes(CPU)
    if torch.cuda.is_available():
        yield from ("", *time_modes(torch.device("cuda")))
    yield from ("", *compare_compiled(), "")
    with tempfile.TemporaryDirectory() as folder:
        yield from compare_settings(options, Path(folder))


if __name__ == "__main__":
    for line in main([f"prompts.count={count}" for count in sys.argv[1:]]):
        print(line, flush=True)
