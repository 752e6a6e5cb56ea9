"""Peak host memory of a reconstruction by its samples, with and without a budget: `python -m benchmarks.memory`.

A PixArt of 4 blocks of width 256, 256 tokens an image; its calls are random, the roundings nearest, so that what is
measured is the calibration data on its way through both models. Each line has a process of its own.
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

from fp4dit import policy
from fp4dit.columns import Room, write
from fp4dit.formats import floating, fp16
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.reconstruction import Reconstruction
from fp4dit.scales import AbsMax
from fp4dit.tasks.reconstruct import Rounded
from pipelines.runtime import Runtime

SAMPLES, BUDGETS, BLOCKS, WIDTH, SIDE, TEXT, HELD_OUT = (64, 256, 512), (None, 0.1), 4, 256, 32, 32, 16
ROWS = [Rule("*", Quantizer(floating(2, 1), Granularity("row"), AbsMax(fp16)))]


def model() -> PixArtPipeline:
    heads = {"num_attention_heads": WIDTH // 64, "attention_head_dim": 64, "cross_attention_dim": WIDTH}
    shape = {"sample_size": SIDE, "caption_channels": WIDTH, "use_additional_conditions": False}
    return PixArtPipeline(PixArtTransformer2DModel(num_layers=BLOCKS, **heads, **shape), TEXT)


def measure(samples: int, budget_gb: float | None) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = {
        "latent": torch.randn(4, SIDE, SIDE),
        "timestep": torch.tensor(500),
        "text": torch.randn(TEXT, WIDTH),
        "bias": torch.zeros(1, TEXT),
    }
    pipeline = model()
    rules = policy.assign(policy.layers(pipeline.dit), ROWS)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        room = Room(float("inf") if budget_gb is None else 1e9 * budget_gb, Path(folder))
        columns = {name: room.column(torch.Size([samples, *row.shape]), row.dtype) for name, row in given.items()}
        for name, row in given.items():
            for i in range(samples):
                write(columns[name], i, row[None] + i)
        trained, held_out = torch.arange(samples).split([samples - HELD_OUT, HELD_OUT])
        work = Reconstruction(pipeline, rules, Rounded(), trained, held_out, 16, Path(folder), room=room)
        began = time.perf_counter()
        work.run(columns, lambda label: Runtime({"accelerator": "cpu", "devices": 1}, "none").trainer)
        seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    limit = "no budget" if budget_gb is None else f"{1000 * budget_gb:.0f} MB"
    return f"{samples:5} samples, {limit:10} {peak:6.0f} MiB more than the model, {seconds:5.1f} s"


def main() -> None:
    for budget, samples in product(BUDGETS, SAMPLES):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            print(pool.submit(measure, samples, budget).result(), flush=True)


if __name__ == "__main__":
    main()
