"""Endless batches of scenes for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fp4dit.models.shapes.build import TOKENS
from fp4dit.models.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    Thing,
    render,
    scenes,
    variant,
)

SHAPE, COLOUR, RADIUS, BACKGROUND = map(list, (SHAPES, COLOURS, RADII, BACKGROUNDS))
ATTRIBUTES = (len(SHAPE), len(COLOUR), len(RADIUS), len(PLACES), len(BACKGROUND))  # answers to what `words` asks
SLOTS = (len(SHAPE) + 1, len(COLOUR) + 1, len(RADIUS) + 1) * len(PLACES) + (len(BACKGROUND),)  # ... and `slots`


class Batch(NamedTuple):
    """Pictures in [-1, 1], their captions, and what a reader of either should be able to say."""

    pictures: Float[Tensor, "n 3 h w"]
    captions: list[str]
    words: Int[Tensor, "n t a"]
    slots: Int[Tensor, "n s"]


def attributes(thing: Thing) -> list[int]:
    return [SHAPE.index(thing.shape), COLOUR.index(thing.colour), RADIUS.index(thing.size)]


def words(scene: Scene) -> Int[Tensor, "t a"]:
    """For each word of an object, that object's shape, colour, size and place; for each of the background, its colour.

    -100 where there is nothing to say.
    """
    answers, at = torch.full((TOKENS, len(ATTRIBUTES)), -100), 0
    for thing, place in zip(scene.things, scene.places, strict=True):
        length = len(str(thing).split())
        answers[at : at + length, :4] = torch.tensor([*attributes(thing), place])
        at += length + len((scene.relation or "").split())
    end = len(scene.caption.split())
    answers[end - len(f"on a {scene.background} background".split()) : end, 4] = BACKGROUND.index(scene.background)
    return answers


def slots(scene: Scene) -> Int[Tensor, "s"]:
    """For each place, the shape, colour and size of what is there, 0 for nothing; last, the background."""
    answers = torch.zeros(len(PLACES), 3, dtype=torch.long)
    for thing, place in zip(scene.things, scene.places, strict=True):
        answers[place] = torch.tensor(attributes(thing)) + 1
    return torch.cat([answers.flatten(), torch.tensor([BACKGROUND.index(scene.background)])])


@dataclass
class Scenes(IterableDataset[Batch]):
    """Endless batches from the `first` on, each of which depends on seed, process and number alone. With `contrast`,
    every other scene is its neighbour with one word changed. The combinations that are `held_out` are in none, or in
    all."""

    batch: int
    seed: int = 0
    contrast: bool = False
    rank: int = 0
    first: int = 0
    held_out: bool = False

    def __iter__(self) -> Iterator[Batch]:
        for number in count(self.first):
            seed = stream_seed(self.seed, self.rank, number)
            stream = self.pairs(seed) if self.contrast else scenes(seed, self.held_out)
            batch = list(islice(stream, self.batch))
            labels = (torch.stack([label(scene) for scene in batch]) for label in (words, slots))
            yield Batch(render(batch), [scene.caption for scene in batch], *labels)

    def pairs(self, seed: int) -> Iterator[Scene]:
        rng = Random(seed)
        for scene in scenes(seed, self.held_out):
            other = variant(scene, rng)
            if other.held_out == self.held_out and other.caption != scene.caption:
                yield scene
                yield other


class SceneData(L.LightningDataModule):
    """Scenes for a Trainer: each process has a stream of its own, and one that is killed goes on with what would have
    come next.

    `batch` is the number of scenes per process.
    """

    def __init__(self, batch: int, seed: int = 0, contrast: bool = False) -> None:
        super().__init__()
        self.batch, self.seed, self.contrast = batch, seed, contrast

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        # Lightning asks for this after it has restored how far it was.
        done = self.trainer.fit_loop.total_batch_idx + 1
        stream = Scenes(self.batch, self.seed, self.contrast, self.trainer.global_rank, done)
        return DataLoader(stream, batch_size=None)


class Noise(L.Callback):
    """What is drawn at a step depends on seed, process and step alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        torch.manual_seed(stream_seed(self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx + 1))


def stream_seed(seed: int, rank: int, step: int) -> int:
    """One seed for each (seed, process, step), far from all others."""
    return Random(f"{seed} {rank} {step}").getrandbits(62)
