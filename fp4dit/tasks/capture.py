"""Record what the transformer is given while the real sampler runs."""

from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch

from fp4dit import calls
from fp4dit.health import guarded
from fp4dit.models.base import Pipeline


class Chunk(NamedTuple):
    """Prompts that are denoised together. Another grouping would differ in the last bits, so it is fixed.

    `first` is the number of the first prompt; each has a seed of its own.
    """

    first: int
    prompts: list[str]
    seeds: list[int]


def chunked(prompts: list[str], size: int, seed: int) -> list[Chunk]:
    """In order; prompt i has seed `seed + i`, whatever the size of a chunk."""
    return [
        Chunk(first, part, [seed + first + i for i in range(len(part))])
        for first in range(0, len(prompts), size)
        for part in [prompts[first : first + size]]
    ]


class CaptureTask(L.LightningModule):
    """One file per chunk under `out`; a file that is there is not made again."""

    def __init__(self, pipeline: Pipeline, out: Path, steps: int, guidance: float) -> None:
        super().__init__()
        self.pipeline, self.out, self.steps, self.guidance = pipeline, out, steps, guidance

    def predict_step(self, chunk: Chunk) -> None:
        path = self.out / f"{chunk.first:05}.safetensors"
        if path.exists():
            return
        self.pipeline.to(self.device)
        with guarded(self.pipeline.dit), calls.listen(self.pipeline.dit) as heard:
            self.pipeline.sample(chunk.prompts, chunk.seeds, self.steps, self.guidance)
        states = [self.pipeline.begin(call) for call in heard]
        rows = len(states[0]["timestep"])  # guidance asks twice for each prompt
        owner = {"prompt": (torch.arange(rows) % len(chunk.prompts)) + chunk.first}
        calls.save([{name: value.cpu() for name, value in state.items()} | owner for state in states], path)
