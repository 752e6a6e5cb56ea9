"""Sets of prompts, from files or class numbers.

A set of prompts is a function from a number to as many prompts. For a larger number, the result
begins with the same prompts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, zip_longest
from random import Random
from typing import Any

from fp4dit.data import readers
from fp4dit.data.readers import Record
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """Prompt of an image.

    Args:
        text: The text, or the number or name of a class.
        group: The part of the set that the prompt belongs to, such as a style or a category. Scores
            are also shown for each group.
    """

    text: str
    group: str | None = None


PromptSource = Callable[[int], list[Prompt]]

NumberedRecord = tuple[int, Record]  # numbered from 1


def get_texts(prompts: Iterable[Prompt]) -> list[str]:
    """Return the texts of prompts."""
    return [prompt.text for prompt in prompts]


def draw_class_prompts(count: int, total: int, seed: int) -> list[Prompt]:
    """Draw numbers of classes as prompts.

    Args:
        count: The number of prompts. If it exceeds `total`, the classes repeat in the same order.
        total: The number of classes.
        seed: The seed of the order of the classes.
    """
    order = list(range(total))
    Random(seed).shuffle(order)
    return [Prompt(str(number)) for number in islice(cycle(order), count)]


def load_prompts(
    count: int, path: str, field: str = "prompt", group: str | None = None, start: int = 0
) -> list[Prompt]:
    """Load prompts from a .txt, .json, .csv or .tsv file; see `fp4dit.data.readers.read_records`.

    Args:
        count: The number of prompts.
        path: The file.
        field: The field that holds the prompt.
        group: The field that holds the group of a prompt, if the set has groups. The prompts then
            come from each group in turn; otherwise they come in file order.
        start: The number of prompts to skip.

    Raises:
        UserError: if the file cannot be read, or if it holds too few prompts.

    Example:
        >>> load_prompts(100, "data/parti/PartiPrompts.tsv", field="Prompt", group="Category")
    """
    rows = list(enumerate(readers.read_records(path), 1))
    if group:
        rows = interleave_lists(group_by_name(rows, lambda row: read_field(row, group, path)))
    prompts = []
    for row in take_records(rows, count, start, path):
        text = read_field(row, field, path)
        prompts.append(Prompt(text, read_field(row, group, path) if group else None))
    return prompts


def load_coco_prompts(
    count: int, path: str, per_image: bool = False, other_path: str | None = None, start: int = 0
) -> list[Prompt]:
    """Load captions from one of COCO's own files; see `fp4dit.data.readers.read_coco_captions`.

    Args:
        count: The number of captions.
        path: The file.
        per_image: Whether to take one caption of each image instead of all.
        other_path: A file whose captions are skipped. COCO's splits have no image in common, but
            they have some sentences in common.
        start: The number of captions to skip.

    Raises:
        UserError: if a file cannot be read, or if it holds too few captions.

    Example:
        >>> load_coco_prompts(1000, "data/coco/annotations/captions_val2017.json", per_image=True)
    """
    excluded = set()
    if other_path:
        for record in readers.read_coco_captions(other_path):
            excluded.add(normalize_text(record["caption"]))
    rows = []
    for number, record in enumerate(readers.read_coco_captions(path, per_image), 1):
        if normalize_text(record["caption"]) not in excluded:
            rows.append((number, record))
    selected = take_records(rows, count, start, path)
    return [Prompt(read_field(row, "caption", path)) for row in selected]


def combine_sets(count: int, sets: Mapping[str, PromptSource]) -> list[Prompt]:
    """Draw prompts from several sets in turn. Their numbers of prompts differ by at most one.

    Args:
        count: The total number of prompts.
        sets: The sets by their names, which become the groups of the prompts.

    Example:
        >>> combine_sets(2, {"a": lambda n: [Prompt("x")] * n, "b": lambda n: [Prompt("y")] * n})
        [Prompt(text='x', group='a'), Prompt(text='y', group='b')]
    """
    minimum, remainder = divmod(count, len(sets))
    lists = []
    for i, (name, draw) in enumerate(sets.items()):
        prompts = draw(minimum + (i < remainder))
        lists.append([replace(prompt, group=name) for prompt in prompts])
    return interleave_lists(lists)


def find_shared_texts(prompts: Iterable[Prompt], others: Iterable[Prompt]) -> list[str]:
    """Return the texts of prompts that are also in `others`, ignoring case and white space."""
    normalized = {normalize_text(text) for text in get_texts(others)}
    return [text for text in get_texts(prompts) if normalize_text(text) in normalized]


def normalize_text(text: str) -> str:
    """Return a text in lower case with single spaces."""
    return " ".join(text.casefold().split())


def take_records(
    rows: Sequence[NumberedRecord], count: int, start: int, path: str
) -> Sequence[NumberedRecord]:
    """Return `count` records after the first `start`, and raise a UserError if there are fewer."""
    if len(rows) < start + count:
        after = f" after the first {start}" if start else ""
        raise UserError(
            f"{path} holds {max(0, len(rows) - start)} prompts{after}, but {count} are needed"
        )
    return rows[start : start + count]


def read_field(row: NumberedRecord, field: str, path: str) -> str:
    """Return the text of a field without white space around it.

    Raises:
        UserError: if the field is missing, empty or not a text.
    """
    number, record = row
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(map(repr, record))
        raise UserError(
            f"{path}: record {number} has no text in its field {field!r}; its fields are {fields}"
        )
    return value.strip()


def group_by_name(
    rows: Iterable[NumberedRecord], get_name: Callable[[NumberedRecord], str]
) -> list[list[NumberedRecord]]:
    """Group records by their names, in the order in which the names first appear."""
    groups: dict[str, list[NumberedRecord]] = {}
    for row in rows:
        groups.setdefault(get_name(row), []).append(row)
    return list(groups.values())


def interleave_lists(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """Take one item of each list in turn until all lists are empty.

    The first few items of the result then come from all lists evenly.
    """
    items = []
    for row in zip_longest(*lists):
        items += [item for item in row if item is not None]
    return items
