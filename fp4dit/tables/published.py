"""Load the results that papers report, from fp4dit/tables/papers. Tables print them beside ours."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class PublishedResult:
    """A paper's numbers for one row, in the units of our columns.

    Attributes:
        values: Numbers by column.
        source: The paper, where the numbers were read, and what they were measured on.
    """

    values: Mapping[str, float]
    source: str


def load_published() -> dict[str, Any]:
    """Load the entries of all papers, by name."""
    entries: dict[str, Any] = {}
    folder = files("fp4dit.tables").joinpath("papers")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            entries |= yaml.safe_load(file.read_text())
    return entries


def find_published(entries: Mapping[str, Any], key: str) -> PublishedResult:
    """Return the result that a row of a table names as ENTRY/ROW.

    Raises:
        UserError: if there is no such entry, or it has no such row.

    Example:
        >>> find_published(load_published(), "svdquant/fp16").values
        {'fid': 16.6, 'image_reward': 0.944}
    """
    name, _, row = key.partition("/")
    keys: list[str] = []
    for entry_name, node in entries.items():
        keys += [f"{entry_name}/{label}" for label in node["rows"]]
    if key not in keys:
        close = difflib.get_close_matches(key, keys, n=3) or keys
        raise UserError(
            f"published: {key!r} is not in fp4dit/tables/papers; there are {', '.join(close)}"
        )
    entry = entries[name]
    factors = entry.get("factors", {})
    values = {}
    for column, value in entry["rows"][row].items():
        values[column] = float(value) * factors.get(column, 1)
    return PublishedResult(values, _describe_source(entry))


def _describe_source(entry: Mapping[str, Any]) -> str:
    setting = ", ".join(f"{word} {value}" for word, value in entry["setting"].items())
    second_hand = "after notes on the paper, not the paper itself" if entry.get("secondary") else ""
    parts = (entry["paper"], entry["source"], second_hand, setting)
    return "; ".join(part for part in parts if part)
