"""Measure the peak host memory of a reconstruction by its samples: `python -m benchmarks.memory`.

It is measured with and without a memory budget. The model is a PixArt of 4 blocks of width 256 with
256 tokens per image. Calls are random and weights are rounded to nearest, so that the result is the
memory of the calibration data. Each line is a process of its own.
"""

import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel

from fp4dit.data.columns import MemoryBudget, write_rows
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from pipelines.runtime.trainer import Runtime

SAMPLES, HELD_OUT = (64, 256, 512), 16
BUDGETS_GB = (None, 0.1)
BLOCKS, WIDTH, SIDE, TEXT_TOKENS = 4, 256, 32, 32
RULES = [Rule("*", Quantizer(floating(2, 1), PerChannel(), AbsMax(fp16)))]


def make_small_pixart() -> PixArtAdapter:
    """Build the model."""
    heads = {
        "num_attention_heads": WIDTH // 64,
        "attention_head_dim": 64,
        "cross_attention_dim": WIDTH,
    }
    shape = {"sample_size": SIDE, "caption_channels": WIDTH, "use_additional_conditions": False}
    return PixArtAdapter(PixArtTransformer2DModel(num_layers=BLOCKS, **heads, **shape), TEXT_TOKENS)


def measure_reconstruction(samples: int, budget_gb: float | None) -> str:
    """Reconstruct the model from some samples, and return a line on memory and time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = {
        "latent": torch.randn(4, SIDE, SIDE),
        "timestep": torch.tensor(500),
        "text": torch.randn(TEXT_TOKENS, WIDTH),
        "bias": torch.zeros(1, TEXT_TOKENS),
    }
    pipeline = make_small_pixart()
    rules = assign_rules(find_layers(pipeline.transformer), RULES)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        budget = float("inf") if budget_gb is None else 1e9 * budget_gb
        memory = MemoryBudget(budget, Path(folder))
        columns = {}
        for name, row in call.items():
            columns[name] = memory.allocate(torch.Size([samples, *row.shape]), row.dtype)
            for i in range(samples):
                write_rows(columns[name], i, row[None] + i)
        trained, held_out = torch.arange(samples).split([samples - HELD_OUT, HELD_OUT])
        reconstruction = Reconstruction(
            pipeline, rules, RoundToNearest(), trained, held_out, 16, Path(folder), memory=memory
        )
        began = time.perf_counter()
        reconstruction.run(
            columns,
            lambda label: Runtime({"accelerator": "cpu", "devices": 1}, "none").make_trainer,
        )
        seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    limit = "no budget" if budget_gb is None else f"{1000 * budget_gb:.0f} MB"
    return f"{samples:5} samples, {limit:10} {peak:6.0f} MiB more than the model, {seconds:5.1f} s"


def main() -> None:
    """Print a line for each budget and number of samples."""
    for budget, samples in product(BUDGETS_GB, SAMPLES):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            print(pool.submit(measure_reconstruction, samples, budget).result(), flush=True)


if __name__ == "__main__":
    main()
