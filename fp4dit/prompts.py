"""Where prompts come from."""

from itertools import cycle, islice
from pathlib import Path
from random import Random

from fp4dit.errors import UserError
from fp4dit.models.shapes.world import scenes


def shapes(count: int, held_out: bool, seed: int = 0) -> list[str]:
    """Captions of the procedural world, from one side of its split."""
    return [scene.caption for scene in islice(scenes(seed, held_out), count)]


def lines(count: int, path: str) -> list[str]:
    """The first `count` lines of a text file that are not blank."""
    if not Path(path).is_file():
        raise UserError(f"there is no file of prompts at {path}")
    found = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if len(found) < count:
        raise UserError(f"{path} holds {len(found)} prompts, {count} are asked for")
    return found[:count]


def classes(count: int, total: int, seed: int) -> list[str]:
    """The numbers of `count` classes of `total`, shuffled, and from the start again when all were there."""
    order = list(range(total))
    Random(seed).shuffle(order)
    return [str(number) for number in islice(cycle(order), count)]
