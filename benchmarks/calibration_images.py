"""Compare images, one by one, after all blocks are rounded by each side of an algorithm.

Run `OMP_NUM_THREADS=1 python -m benchmarks.calibration_images FOLDER GPTQ SignRound 2>/dev/null`
with names of `benchmarks.bench_calibration.SIDES`; FOLDER is the one of that benchmark. The blocks
of the shipped model are rounded in order, each with the inputs that the rounded ones before it
give. A side takes some minutes.
"""

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from benchmarks import calibration_peers as peers
from benchmarks.adaround import CPU
from benchmarks.bench_calibration import SIDES, Scale, capture_calls
from benchmarks.cpu import SHIPPED
from benchmarks.full_precision import draw
from benchmarks.gpu import run_in_process
from benchmarks.timing import format_header, format_row
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit

SCALE = Scale(prompts=(24, 8), steps=200)
IMAGES = 64


def round_blocks_(pipeline: Any, algorithm: str, package: str, scale: Scale) -> float:
    """Round all blocks in place, and return the error of a call on unseen prompts."""
    parts = [
        capture_calls(pipeline, count, held_out, scale)
        for count, held_out in zip(scale.prompts, (False, True), strict=True)
    ]
    num_train = len(parts[0]["timestep"])
    original: dict[str, Any] = {name: torch.cat([x[name] for x in parts]) for name in parts[0]}
    rounded, teacher = dict(original), copy.deepcopy(pipeline.transformer)
    for unit in pipeline.units():
        target = propagate_unit(
            teacher.get_submodule(unit.module), unit, original, peers.BATCH, CPU
        )
        module = pipeline.transformer.get_submodule(unit.module)
        if unit.module.startswith("transformer_blocks"):
            data = UnitDataset(unit, rounded, target, torch.arange(num_train))
            with redirect_stdout(sys.stderr):
                SIDES[algorithm][package](module, data, scale.steps)
            module.eval().to(CPU)
        original |= target
        rounded |= propagate_unit(module, unit, rounded, peers.BATCH, CPU)
    unseen = torch.arange(num_train, len(original["timestep"]))
    output, target = ({"hidden": x["hidden"]} for x in (rounded, original))
    return compute_relative_error(output, target, unseen)


def measure_images(
    algorithm: str, package: str, folder: str, scale: Scale, count: int
) -> tuple[float, list[float]]:
    """Return the error of a call, and the PSNR of each image in dB."""
    sys.path.append(folder)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pipeline: Any = SHIPPED.load()
    reference = draw(pipeline, count)
    error = round_blocks_(pipeline, algorithm, package, scale)
    mse: Tensor = (draw(pipeline, count) - reference).square().flatten(1).mean(1)
    return error, (-10 * mse.log10()).tolist()


def report(
    folder: str, algorithms: Sequence[str], scale: Scale, count: int, run: Any = run_in_process
) -> Iterator[str]:
    """Yield the lines of a Markdown table.

    The difference is that to our side for the same image, with its standard error.
    """
    yield from format_header("all blocks", "error of a call", "PSNR, dB", "difference, dB")
    for algorithm in algorithms:
        ours = torch.empty(0)
        for package in SIDES[algorithm]:
            error, values = run(measure_images, algorithm, package, folder, scale, count)
            psnr = torch.tensor(values)
            ours = ours if len(ours) else psnr
            more = psnr - ours
            difference = f"{more.mean():+.2f} ± {more.std() / len(more) ** 0.5:.2f}"
            label = f"{algorithm}: {package}"
            yield format_row(label, f"{error:.2e}", f"{psnr.mean():.2f}", difference)


if __name__ == "__main__":
    for line in report(sys.argv[1], sys.argv[2:], SCALE, IMAGES):
        print(line, flush=True)
