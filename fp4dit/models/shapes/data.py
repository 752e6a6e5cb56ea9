"""Endless batches of scenes for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from torch import Tensor
from torch.utils.data import IterableDataset

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
