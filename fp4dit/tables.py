"""A table: rows, what they say, and how sure one can be of it."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fp4dit import comparisons
from fp4dit.comparisons import BEST, Comparison, Mark
from fp4dit.rows import Column, Row, expanded
from fp4dit.statistics import MANY

FEW = 5_000  # images, below which the score of a set is not to be compared with what others report
FEW_NOTE = (
    "⚠: of fewer than 5,000 images. A set's score depends on its size: compare it only with scores of sets as large."
)
SHORT = 140  # characters of a metric's description, in what is meant to be read


@dataclass(frozen=True)
class Table:
    """Rows, and what they say. `finding` and `contradicts` (of the papers) are written by whoever has read the
    numbers, so they stand in no table that lacks one of its rows.
    """

    rows: Sequence[Row]
    asked: Sequence[Column]
    question: str = ""
    finding: str = ""
    contradicts: Sequence[str] = ()
    notes: Sequence[str] = ()

    @cached_property
    def columns(self) -> list[Column]:
        return expanded(self.asked, self.rows)

    @property
    def heading(self) -> str:
        there = sum(bool(r.values) for r in self.rows)
        if there < len(self.rows):
            return f"Not complete: {there} of {len(self.rows)} rows"
        return self.finding or self.question

    @property
    def against_papers(self) -> Sequence[str]:
        return self.contradicts if all(r.values for r in self.rows) else ()

    @cached_property
    def groups(self) -> dict[str | None, list[int]]:
        """Which rows each group has, in the order of its first row; those without one come first, if any."""
        names = dict.fromkeys([None, *(r.group for r in self.rows)])
        found = {name: [i for i, r in enumerate(self.rows) if r.group == name] for name in names}
        return {name: members for name, members in found.items() if members}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        return comparisons.compared(list(comparisons.pairings(self.rows, self.columns, self.groups)))

    @cached_property
    def marks(self) -> list[dict[str, Mark]]:
        return comparisons.marks(self.rows, self.columns, self.groups, self.comparisons)

    @cached_property
    def sources(self) -> list[str]:
        """What is published, for footnotes by number."""
        return list(dict.fromkeys(r.published.footnote for r in self.rows if r.published))

    def is_published(self, column: Column) -> bool:
        return any(r.published and column.metric in r.published.values for r in self.rows)

    def warns(self, i: int, column: Column) -> bool:
        """Whether the score of a set is one of too few images."""
        values = self.rows[i].values
        return column.of_set and values.get(column.name) is not None and (values.get("n") or 0) < FEW

    def mark(self, i: int, column: Column) -> Mark:
        return self.marks[i].get(column.name, Mark())

    def signs(self, i: int, column: Column) -> list[str]:
        """What stands behind a number, as the legend explains it."""
        mark = self.mark(i, column)
        arrow = {-1: "↓", 0: "", 1: "↑"}[mark.against]
        return [sign for sign in ("†" if mark.equal else "", arrow, "⚠" if self.warns(i, column) else "") if sign]

    def numbers(self, i: int) -> dict[str, Any]:
        """All that is known of a row by CSV column, unrounded: its values, differences to full precision and to the
        best of its group, and what is published."""
        own = self.rows[i]
        found: dict[str, Any] = dict(own.values)
        for c in (c for c in self.comparisons if c.row == i):
            name = f"{c.column.name}_{'best_diff' if c.rival == BEST else 'diff'}"
            found |= {name: c.difference.mean, f"{name}_low": c.difference.low, f"{name}_high": c.difference.high}
        for column in self.columns:
            theirs = own.published.values.get(column.metric) if own.published else None
            if theirs is not None:
                ours = own.values.get(column.name)
                found[f"{column.name}_published"] = theirs
                found[f"{column.name}_minus_published"] = None if ours is None else ours - theirs
        return found

    def legend(self, bold: str) -> str:
        """Of the marks that there are, and what was done for them."""
        said = [mark for marks in self.marks for mark in marks.values()]
        count, ways = len(self.comparisons), comparisons.resamples(len(self.comparisons))
        against = any(m.against for m in said)
        marks = [
            f"{bold}: the best of its group." if any(m.best for m in said) else "",
            "†: not distinguishable from it." if any(m.equal for m in said) else "",
            "↓, ↑: worse, better than full precision." if against else "",
        ]
        test = (
            "Tested image by image of the same prompt and seed, by changing signs of the differences "
            f"({ways:,} times, or in all ways there are; Student's t from {MANY:,} images), at 5 % after Holm's "
            f"correction for the {count} comparisons of this table. What is no mean over images is not tested."
        )
        return " ".join(text for text in [*marks, test if count else ""] if text)

    def footnotes(self, bold: str) -> list[str]:
        few = any(self.warns(i, c) for i in range(len(self.rows)) for c in self.columns)
        published = [f"[{k}] Published: {source}." for k, source in enumerate(self.sources, 1)]
        happened = [f"{c.title}: {text}." for c in self.columns for text in self.told("notes", c)]
        about = [f"{c.title}: {textwrap.shorten(t, SHORT)}" for c in self.columns for t in self.told("about", c)]
        legend = [text for text in [self.legend(bold), FEW_NOTE if few else ""] if text]
        return [*legend, *self.notes, *happened, *about, *published]

    def told(self, what: str, column: Column) -> list[str]:
        """What was noted of a metric, once for all rows of which it is the same."""
        said: list[Mapping[str, str]] = [getattr(r, what) for r in self.rows]
        names = (column.name, column.metric)
        return list(dict.fromkeys(texts[name] for texts in said for name in names if name in texts))
