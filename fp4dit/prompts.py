"""Where prompts come from. A set of prompts is a function of how many are wanted; more begin with the same ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, zip_longest
from random import Random
from typing import Any

from fp4dit import records
from fp4dit.errors import UserError
from fp4dit.models.shapes.world import scenes
from fp4dit.records import Record


@dataclass(frozen=True)
class Prompt:
    """What to draw, and which part of its set it belongs to, a style or a category, if the set has parts."""

    text: str
    group: str | None = None


Prompts = Callable[[int], list[Prompt]]
Row = tuple[int, Record]  # numbered from 1


def texts(prompts: Iterable[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def shapes(count: int, held_out: bool, seed: int = 0) -> list[Prompt]:
    """Captions of the procedural world, from one side of its split."""
    return [Prompt(scene.caption) for scene in islice(scenes(seed, held_out), count)]


def classes(count: int, total: int, seed: int) -> list[Prompt]:
    """The numbers of `count` classes of `total`, shuffled, and from the start again when all were there."""
    order = list(range(total))
    Random(seed).shuffle(order)
    return [Prompt(str(number)) for number in islice(cycle(order), count)]


def from_file(count: int, path: str, field: str = "prompt", group: str | None = None, start: int = 0) -> list[Prompt]:
    """`count` prompts of a .txt, .json, .csv or .tsv, after the first `start`; see `records.read`.

    In file order, or, where the field `group` names the part of the set that each belongs to, one of each part in turn.
    """
    rows = list(enumerate(records.read(path), 1))
    if group:
        rows = in_turn(parts(rows, lambda row: value(row, group, path)))
    return [
        Prompt(value(row, field, path), value(row, group, path) if group else None)
        for row in first(rows, count, start, path)
    ]


def coco(count: int, path: str, per_image: bool = False, other_path: str | None = None, start: int = 0) -> list[Prompt]:
    """`count` captions of one of COCO's own files, after the first `start`; see `records.coco`.

    COCO's splits share no image, but common sentences stand in more than one: those of the file `other_path` are passed
    over.
    """
    other = {folded(record["caption"]) for record in records.coco(other_path)} if other_path else set()
    rows = [row for row in enumerate(records.coco(path, per_image), 1) if folded(row[1]["caption"]) not in other]
    return [Prompt(value(row, "caption", path)) for row in first(rows, count, start, path)]


def grouped(count: int, sets: Mapping[str, Prompts]) -> list[Prompt]:
    """As many of each of the sets, give or take one; one of each in turn, and each known by its set's name."""
    share = [count // len(sets) + (i < count % len(sets)) for i in range(len(sets))]
    drawn = zip(sets.items(), share, strict=True)
    return in_turn([[replace(prompt, group=name) for prompt in draw(part)] for (name, draw), part in drawn])


def shared(one: Iterable[Prompt], other: Iterable[Prompt]) -> list[str]:
    """The texts of `one` that are in `other` too, but for case and white space."""
    known = {folded(text) for text in texts(other)}
    return [text for text in texts(one) if folded(text) in known]


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def first(rows: Sequence[Row], count: int, start: int, path: str) -> Sequence[Row]:
    if len(rows) < start + count:
        after = f" after the first {start}" if start else ""
        raise UserError(f"{path} holds {max(0, len(rows) - start)} prompts{after}, {count} are asked for")
    return rows[start : start + count]


def value(row: Row, field: str, path: str) -> str:
    """The text of a field, without white space around it."""
    number, record = row
    found = record.get(field)
    if not isinstance(found, str) or not found.strip():
        there = ", ".join(map(repr, record))
        raise UserError(f"{path}: record {number} has no text in its field {field!r}; its fields are {there}")
    return found.strip()


def parts(rows: Iterable[Row], name: Callable[[Row], str]) -> list[list[Row]]:
    """Rows of one name together, in the order in which the names first appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return list(found.values())


def in_turn(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """One of each in turn, as long as it lasts: the first few are spread evenly, whatever the order of a file."""
    return [item for row in zip_longest(*lists) for item in row if item is not None]
