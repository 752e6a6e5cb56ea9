"""Endless batches of a world's scenes, with the labels that the trained parts learn to read."""

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

from fp4dit.worlds.base import PLACES, Scene, Thing, World, describe_thing

NO_ANSWER = -100  # the label that cross-entropy ignores


class Batch(NamedTuple):
    """A batch of scenes.

    Attributes:
        pictures: Rendered scenes in [-1, 1].
        captions: Their captions.
        words: Labels of each word, which `TextTask` reads; see `label_words`.
        slots: Labels of each place, which `ClipTask` and `OracleTask` read; see `label_slots`.
    """

    pictures: Float[Tensor, "n 3 h w"]
    captions: list[str]
    words: Int[Tensor, "n t a"]
    slots: Int[Tensor, "n s"]


def index_attributes(world: World, thing: Thing) -> list[int]:
    """Return the index of the object's choice of every attribute."""
    return [choices.index(getattr(thing, name)) for name, choices in world.attributes.items()]


def label_words(world: World, scene: Scene) -> Int[Tensor, "t a"]:
    """Return the answers to learn for each word of a caption, or NO_ANSWER.

    A word of an object answers with the object's attributes and its place. A word of the background
    answers with the background. `TextTask` reads the answers.

    Returns:
        One row for each of the t tokens of a caption, and one column for each of the a questions:
        every attribute, the place and the background, as in `World.word_choices`.
    """
    answers, at = torch.full((world.tokens, len(world.word_choices)), NO_ANSWER), 0
    for thing, place in zip(scene.things, scene.places, strict=True):
        length = len(describe_thing(thing).split())
        answers[at : at + length, :-1] = torch.tensor([*index_attributes(world, thing), place])
        at += length + len((scene.relation or "").split())
    end = len(scene.caption.split())
    start = end - len(f"on a {scene.background} background".split())
    answers[start:end, -1] = world.backgrounds.index(scene.background)
    return answers


def label_slots(world: World, scene: Scene) -> Int[Tensor, "s"]:
    """Return the attributes of the object at every place, and the background last.

    An attribute is its index + 1, and 0 at an empty place. `ClipTask` and `OracleTask` read the
    answers.

    Returns:
        One answer for each of the s slots: every attribute of every place, and the background, as
        in `World.slot_choices`.
    """
    answers = torch.zeros(len(PLACES), len(world.attributes), dtype=torch.long)
    for thing, place in zip(scene.things, scene.places, strict=True):
        answers[place] = torch.tensor(index_attributes(world, thing)) + 1
    background = torch.tensor([world.backgrounds.index(scene.background)])
    return torch.cat([answers.flatten(), background])


@dataclass
class SceneStream(IterableDataset[Batch]):
    """Endless batches of scenes. A batch depends on the seed, the process and its number alone.

    Args:
        world: The source of scenes.
        batch: The number of scenes in a batch.
        seed: The seed of the scenes.
        contrast: Follow every scene by its variant with one word changed.
        rank: The process; each has its own batches.
        first: The number of the first batch.
        held_out: True for scenes kept for evaluation, False for scenes to learn from.

    Example:
        >>> batch = next(iter(SceneStream(ShapesWorld(), batch=8)))
    """

    world: World
    batch: int
    seed: int = 0
    contrast: bool = False
    rank: int = 0
    first: int = 0
    held_out: bool = False

    def __iter__(self) -> Iterator[Batch]:
        for number in count(self.first):
            seed = derive_seed(self.seed, self.rank, number)
            if self.contrast:
                stream = self.iterate_pairs(seed)
            else:
                stream = self.world.iterate_scenes(seed, self.held_out)
            yield make_batch(self.world, list(islice(stream, self.batch)))

    def iterate_pairs(self, seed: int) -> Iterator[Scene]:
        """Yield scenes, each followed by its variant."""
        rng = Random(seed)
        for scene in self.world.iterate_scenes(seed, self.held_out):
            other = self.world.vary_scene(scene, rng)
            if other.held_out == self.held_out and other.caption != scene.caption:
                yield scene
                yield other


def make_batch(world: World, scenes: list[Scene]) -> Batch:
    """Render and label scenes."""
    captions = [scene.caption for scene in scenes]
    words = torch.stack([label_words(world, scene) for scene in scenes])
    slots = torch.stack([label_slots(world, scene) for scene in scenes])
    return Batch(world.render_scenes(scenes), captions, words, slots)


class SceneData(L.LightningDataModule):
    """Endless scenes for a Trainer.

    Each process has its own batches. A resumed training goes on after its last finished batch.

    Args:
        world: The source of scenes.
        batch: The number of scenes in a batch of one process.
        seed: The seed of the scenes.
        contrast: Follow every scene by its variant with one word changed.

    Example:
        >>> trainer.fit(task, SceneData(ShapesWorld(), batch=32))
    """

    def __init__(self, world: World, batch: int, seed: int = 0, contrast: bool = False) -> None:
        super().__init__()
        self.world, self.batch, self.seed, self.contrast = world, batch, seed, contrast

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        # Lightning calls this after it has restored the number of finished batches.
        done = self.trainer.fit_loop.total_batch_idx + 1
        stream = SceneStream(
            self.world, self.batch, self.seed, self.contrast, self.trainer.global_rank, done
        )
        return DataLoader(stream, batch_size=None)


class SeedNoise(L.Callback):
    """Seed torch before each step, from a seed, the process and the step.

    Args:
        seed: The seed.

    Example:
        >>> lightning.Trainer(callbacks=[SeedNoise(seed=0)]).fit(task, scenes)
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.fit_loop.total_batch_idx + 1
        torch.manual_seed(derive_seed(self.seed, trainer.global_rank, step))


def derive_seed(seed: int, rank: int, step: int) -> int:
    """Return one seed for each (seed, process, step), far from all others."""
    return Random(f"{seed} {rank} {step}").getrandbits(62)
