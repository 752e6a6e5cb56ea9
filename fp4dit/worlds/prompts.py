"""Captions of a world as prompts."""

from itertools import islice

from fp4dit.data.prompts import Prompt
from fp4dit.worlds.base import World


def draw_captions(count: int, world: World, held_out: bool, seed: int = 0) -> list[Prompt]:
    """Draw captions of a world as prompts.

    Args:
        count: Number of prompts.
        world: Source of scenes.
        held_out: True for scenes kept for evaluation, False for scenes to learn from.
        seed: Seed of the scenes.
    """
    prompts = []
    for scene in islice(world.iterate_scenes(seed, held_out), count):
        prompts.append(Prompt(scene.caption))
    return prompts
