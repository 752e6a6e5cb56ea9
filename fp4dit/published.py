"""What papers report, to stand beside what is measured here."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4dit.errors import UserError


@dataclass(frozen=True)
class Published:
    """A paper's numbers for a row, in the units of our metrics; None where the paper has one that is not at hand.

    `source` names the paper, where its numbers were read, and what they were measured on; `reason` says why there are
    none.
    """

    values: Mapping[str, float | None]
    source: str
    reason: str = ""

    @property
    def footnote(self) -> str:
        return f"{self.source}. n/a: {self.reason}" if self.reason else self.source


def published(data: Mapping[str, Any], key: str) -> Published:
    """Of `entry/row`, as a table's row names it.

    Raises:
        UserError: if the data have no such entry, or it no such row.
    """
    name, _, label = key.partition("/")
    there = [f"{entry}/{row}" for entry, given in data.items() for row in given["rows"]]
    if key not in there:
        close = difflib.get_close_matches(key, there, n=3) or there
        raise UserError(f"published: {key!r} is not in conf/published.yaml; there are {', '.join(close)}")
    entry = data[name]
    factors = entry.get("factors", {})
    values = {m: None if v is None else float(v) * factors.get(m, 1) for m, v in (entry["rows"][label] or {}).items()}
    setting = ", ".join(f"{word} {value}" for word, value in entry["setting"].items())
    second_hand = "after notes on the paper, not the paper itself" if entry.get("secondary") else ""
    source = "; ".join(text for text in (entry["paper"], entry["source"], second_hand, setting) if text)
    return Published(values, source, entry.get("reason", "") if None in values.values() else "")
