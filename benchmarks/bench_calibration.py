"""Compare GPTQ, SignRound and AdaRound on one block with brevitas and auto-round, on one core.

Run `OMP_NUM_THREADS=1 python -m benchmarks.bench_calibration FOLDER 2>/dev/null`. FOLDER holds the
other packages, which are no dependencies of this project. The last lines say how to install those
that are missing. All sides round the linear layers of a block of the shipped model to INT4 in
groups of 128, with a zero point and min-max ranges, and from the same captured calls. They take
turns, and each run has a process of its own, because its peak of memory is measured.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import calibration_peers as peers
from benchmarks.adaround import CPU, bind_trainer
from benchmarks.cpu import SHIPPED
from benchmarks.gpu import run_in_process
from benchmarks.timing import format_header, format_row, peak_memory_mib
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit
from fp4dit.data.prompts import get_texts
from fp4dit.models.blocks import Unit
from fp4dit.numerics.formats import fp16
from fp4dit.quantization.apply import quantize_weights_
from fp4dit.quantization.rule_specs import weight_rules
from fp4dit.quantization.rules import assign_rules, find_layers
from fp4dit.rounding import (
    GPTQ,
    LayerwiseReconstruction,
    LearnedRounding,
    RelativeMSE,
    RoundingMethod,
    RoundToNearest,
    SignRound,
    SignSGD,
    activation_order,
    fused_adam,
    linear_decay,
    round_scale_to_format,
)
from fp4dit.rounding.adaround import adaround
from fp4dit.utils.calls import record_calls
from fp4dit.utils.resumable import ResumableTrainers
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions

RULES = weight_rules(
    "uint4", {"per": "group", "size": peers.GROUP}, {"rule": "minmax", "dtype": "fp16"}
)
OURS = "fp4dit"
# Each package with what it needs beside the dependencies of this project.
REQUIREMENTS = {
    "auto_round": "auto-round datasets pyarrow pandas dill multiprocess xxhash py-cpuinfo",
    "brevitas": "brevitas dependencies==2.0.1 unfoldNd",
}

RoundBlock = Callable[[nn.Module, UnitDataset, int], None]


@dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark.

    Args:
        block: number of the block.
        prompts: prompts to calibrate on, and further ones for the error.
        sampler: steps of the sampler.
        steps: steps of learned rounding, for each layer or for the block.
        turns: runs of each side, of which the fastest counts.
    """

    block: int = 3
    prompts: tuple[int, int] = (16, 8)
    sampler: int = 20
    steps: int = 100
    turns: int = 2


def round_with_ours(
    block: nn.Module, data: UnitDataset, steps: int, make: Callable[[int], RoundingMethod]
) -> None:
    """Round with a method of this project.

    Args:
        make: makes the method from the number of steps.
    """
    layers = quantize_weights_(block, assign_rules(find_layers(block), RULES))
    for layer in layers.values():
        layer.prepare()
    trainers = ResumableTrainers(bind_trainer(CPU))
    make(steps).round_unit(block, list(layers.values()), data, trainers)


def make_signround(steps: int) -> LearnedRounding:
    """Return SignRound with the options of `conf/rounding/signround.yaml`."""
    return LearnedRounding(
        partial(SignRound, scale_rounding=partial(round_scale_to_format, fmt=fp16)),
        partial(SignSGD, lr=1 / steps),
        RelativeMSE(weight=0.0),
        steps,
        peers.BATCH,
        precision="bf16-mixed",
        schedule=partial(linear_decay, steps=steps),
        keep_best=True,
    )


def make_adaround(steps: int) -> LayerwiseReconstruction:
    """Return AdaRound with the options of `conf/rounding/adaround_layerwise.yaml`."""
    adam = partial(fused_adam, lr=peers.LEARNING_RATE)
    inner = LearnedRounding(
        adaround, adam, RelativeMSE(), steps, peers.BATCH, precision="bf16-mixed"
    )
    return LayerwiseReconstruction(inner, peers.BATCH)


# The side of each algorithm by the package that it needs.
SIDES: Mapping[str, Mapping[str, RoundBlock]] = {
    "nearest": {OURS: partial(round_with_ours, make=lambda _: RoundToNearest())},
    "GPTQ": {
        OURS: partial(round_with_ours, make=lambda _: GPTQ()),
        "brevitas": peers.round_with_brevitas_gptq,
    },
    "GPTQ, largest activations first": {
        OURS: partial(round_with_ours, make=lambda _: GPTQ(order=activation_order)),
        "brevitas": partial(peers.round_with_brevitas_gptq, in_order=True),
    },
    "SignRound": {
        OURS: partial(round_with_ours, make=make_signround),
        "auto_round": peers.tune_with_auto_round,
        "brevitas": peers.tune_with_brevitas_signround,
    },
    "AdaRound by layers": {
        OURS: partial(round_with_ours, make=make_adaround),
        "brevitas": peers.tune_with_brevitas_adaround,
    },
}


def capture_calls(pipeline: Any, count: int, held_out: bool, scale: Scale) -> dict[str, Tensor]:
    """Return the inputs of the transformer while it draws captions, with one row per sample."""
    captions = draw_captions(count, ShapesWorld(), held_out=held_out)
    texts = [str(text) for text in get_texts(captions)]
    with record_calls(pipeline.transformer) as recorded:
        pipeline.sample(texts, range(1000, 1000 + count), scale.sampler, 4.5)
    states = [pipeline.initial_state(call) for call in recorded]
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def write_block_data(path: Path, scale: Scale) -> None:
    """Write the inputs and outputs of the block for calibration calls, followed by unseen ones."""
    torch.set_num_threads(1)
    pipeline: Any = SHIPPED.load()
    parts = [
        capture_calls(pipeline, count, held_out, scale)
        for count, held_out in zip(scale.prompts, (False, True), strict=True)
    ]
    columns: dict[str, Any] = {name: torch.cat([x[name] for x in parts]) for name in parts[0]}
    name = f"transformer_blocks.{scale.block}"
    for unit in pipeline.units():
        module = pipeline.transformer.get_submodule(unit.module)
        outputs = propagate_unit(module, unit, columns, peers.BATCH, CPU)
        if unit.module == name:
            inputs = unit.select_inputs(columns, slice(None))
            tensors = {**inputs, "target": outputs["hidden"]}
            save_file({key: x.contiguous() for key, x in tensors.items()}, path)
            return
        columns |= outputs


def load_block(path: Path, scale: Scale) -> tuple[nn.Module, Unit, dict[str, Tensor]]:
    """Return the block, its unit, and what `write_block_data` wrote."""
    pipeline: Any = SHIPPED.load()
    name = f"transformer_blocks.{scale.block}"
    [unit] = [unit for unit in pipeline.units() if unit.module == name]
    return pipeline.transformer.get_submodule(name), unit, load_file(path)


def measure_side(
    algorithm: str, package: str, path: Path, folder: str, scale: Scale
) -> tuple[float, float, float]:
    """Return the CPU seconds, the MiB beyond those before, and the error on unseen calls.

    Args:
        path: file of `write_block_data`.
        folder: folder of the packages.
    """
    sys.path.append(folder)  # behind our own packages, which must not be replaced
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    block, unit, columns = load_block(path, scale)
    target = {"hidden": columns.pop("target")}
    first, second = scale.prompts
    num_train = len(target["hidden"]) * first // (first + second)
    data = UnitDataset(unit, columns, target, torch.arange(num_train))
    before, began = peak_memory_mib(), time.process_time()
    with redirect_stdout(sys.stderr):  # where the packages' own lines belong
        SIDES[algorithm][package](block, data, scale.steps)
    seconds, more = time.process_time() - began, peak_memory_mib() - before
    outputs = propagate_unit(block.eval().to(CPU), unit, columns, peers.BATCH, CPU)
    unseen = torch.arange(num_train, len(target["hidden"]))
    return seconds, more, compute_relative_error(outputs, target, unseen)


def report(scale: Scale, folder: str, run: Callable[..., Any] = run_in_process) -> Iterator[str]:
    """Yield the lines of a Markdown table, and one for each package that is missing.

    Args:
        folder: folder of the packages.
        run: a function that calls another function in a process of its own.
    """
    sys.path.append(folder)
    missing = [package for package in REQUIREMENTS if find_spec(package) is None]
    columns = ("CPU s", "MiB more", "error on unseen calls")
    yield from format_header(f"{scale.steps} steps", *columns)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "block.safetensors"
        run(write_block_data, path, scale)
        for algorithm, sides in SIDES.items():
            present = [package for package in sides if package not in missing]
            results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in present}
            for _ in range(scale.turns):
                for package in present:
                    arguments = (algorithm, package, path, folder, scale)
                    results[package].append(run(measure_side, *arguments))
            for package, runs in results.items():
                seconds, more, error = (min(values) for values in zip(*runs, strict=True))
                label = f"{algorithm}: {package}"
                yield format_row(label, f"{seconds:.2f}", f"{more:.0f}", f"{error:.3e}")
    for package in missing:
        command = f"pip install --no-deps --target {folder} {REQUIREMENTS[package]}"
        yield f"\n{package} is missing, and its rows with it: {command}"


if __name__ == "__main__":
    for line in report(Scale(), sys.argv[1] if sys.argv[1:] else "outputs/peers"):
        print(line, flush=True)
