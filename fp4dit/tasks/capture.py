"""Record what the transformer is given while the real sampler runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch

from fp4dit import calls
from fp4dit.errors import UserError
from fp4dit.health import guarded
from fp4dit.models.base import Pipeline
from fp4dit.stream import State


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


Alteration = Callable[[Sequence[State], Chunk], Sequence[State]]


def as_heard(states: Sequence[State], chunk: Chunk) -> Sequence[State]:
    return states


def noise_at_index(states: Sequence[State], chunk: Chunk) -> Sequence[State]:
    """What FP4DiT's released code calibrates PixArt on, for comparison: the latents are noise at every step, the
    timestep is the step's index, and no token of the text is masked.

    Raises:
        UserError: if the model is given no mask as PixArt is.
    """
    if "bias" not in states[0]:
        raise UserError("calibration=reference_quirk is what FP4DiT's released code does for PixArt: take another one")
    generators = [torch.Generator().manual_seed(seed) for seed in chunk.seeds]
    altered = []
    for index, state in enumerate(states):
        latent = state["latent"]
        noise = torch.stack([torch.randn(latent.shape[1:], generator=generator) for generator in generators])
        altered.append(
            state
            | {
                "latent": noise.repeat(len(latent) // len(noise), 1, 1, 1).to(latent),  # guidance asks twice
                "timestep": torch.full_like(state["timestep"], index),
                "bias": torch.zeros_like(state["bias"]),
            }
        )
    return altered


def files(out: Path, chunk: Chunk) -> list[Path]:
    return [out / f"{chunk.first:05}.safetensors"]


class CaptureTask(L.LightningModule):
    """One file per chunk under `out`. What is written may be altered, and is of `kept` steps, evenly spread from the
    first to the last, or of all."""

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        steps: int,
        guidance: float,
        alter: Alteration = as_heard,
        kept: int | None = None,
    ) -> None:
        super().__init__()
        self.kept = kept
        self.pipeline, self.out, self.steps, self.guidance, self.alter = pipeline, out, steps, guidance, alter

    def predict_step(self, chunk: Chunk) -> None:
        [path] = files(self.out, chunk)
        self.pipeline.to(self.device)
        with guarded(self.pipeline.dit), calls.listen(self.pipeline.dit) as made:
            self.pipeline.sample(chunk.prompts, chunk.seeds, self.steps, self.guidance)
        chosen = torch.linspace(0, len(made) - 1, min(self.kept or len(made), len(made))).round().int()
        states = [self.pipeline.begin(made[i]) for i in chosen]
        rows = len(states[0]["timestep"])  # guidance asks twice for each prompt
        owner = {"prompt": (torch.arange(rows) % len(chunk.prompts)) + chunk.first}
        heard = [{name: value.cpu() for name, value in state.items()} | owner for state in states]
        calls.save(self.alter(heard, chunk), path)
