"""Endless batches of scenes for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fp4dit.models.shapes.world import Scene, render, scenes, variant


@dataclass
class Scenes(IterableDataset[tuple[Tensor, list[str]]]):
    """Batches (pictures (n, 3, 64, 64) in [-1, 1], their n captions), never of a held-out combination.

    With `contrast`, every other scene is its neighbour with one word changed.
    """

    batch: int
    seed: int = 0
    contrast: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        stream = self.pairs() if self.contrast else scenes(self.seed, held_out=False)
        while True:
            batch = list(islice(stream, self.batch))
            yield render(batch), [scene.caption for scene in batch]

    def pairs(self) -> Iterator[Scene]:
        rng = Random(self.seed)
        for scene in scenes(self.seed, held_out=False):
            other = variant(scene, rng)
            if not other.held_out and other.caption != scene.caption:
                yield scene
                yield other


class SceneData(L.LightningDataModule):
    """Scenes for a Trainer: each process, and each resumption, has a stream and noise of its own.

    `batch` is the number of scenes per process.
    """

    def __init__(self, batch: int, seed: int = 0, contrast: bool = False) -> None:
        super().__init__()
        self.batch, self.seed, self.contrast = batch, seed, contrast

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        # Lightning asks for this after it has restored the step.
        seed = stream_seed(self.seed, self.trainer.global_rank, self.trainer.global_step)
        torch.manual_seed(seed)
        return DataLoader(Scenes(self.batch, seed, self.contrast), batch_size=None)


def stream_seed(seed: int, rank: int, step: int) -> int:
    """One seed for each (seed, process, first step), far from all others."""
    return Random(f"{seed} {rank} {step}").getrandbits(62)
