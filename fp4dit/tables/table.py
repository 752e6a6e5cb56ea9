"""A table: its rows, their numbers, the significance of differences, and its footnotes."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fp4dit.tables import significance
from fp4dit.tables.rows import ScoredRow, TableColumn, expand_columns
from fp4dit.tables.significance import BEST, Comparison, Mark
from fp4dit.utils.statistics import MIN_VALUES_FOR_T

MIN_SET_SIZE = 5_000  # images that a set metric needs to be comparable with published values

SMALL_SET_NOTE = (
    "⚠: of fewer than 5,000 images. A set's score depends on its size: compare it only with scores "
    "of sets as large."
)

MAX_DESCRIPTION = 140  # characters of a metric's description in a footnote


@dataclass(frozen=True)
class Table:
    """Rows of results, and sentences about them.

    Attributes:
        rows: The rows.
        requested_columns: Columns to print. A set metric becomes a column for each reference.
        question: What the table asks.
        finding: Answer, written after measuring. It is printed only if no row is missing.
        contradicts: Results that differ from a paper's, printed under the same condition.
        notes: Sentences that are always printed.

    Example:
        >>> rows = [ScoredRow("FP4DiT", {"n": 64, "bits_weight": 4.13})]
        >>> print(render_markdown(Table(rows, [TableColumn("bits_weight", "Bits W", 2)])))
    """

    rows: Sequence[ScoredRow]
    requested_columns: Sequence[TableColumn]
    question: str = ""
    finding: str = ""
    contradicts: Sequence[str] = ()
    notes: Sequence[str] = ()

    @cached_property
    def columns(self) -> list[TableColumn]:
        """The columns, one for each reference of a set metric."""
        return expand_columns(self.requested_columns, self.rows)

    @property
    def heading(self) -> str:
        """The finding, or the question, or how many rows are missing."""
        num_present = sum(bool(row.values) for row in self.rows)
        if num_present < len(self.rows):
            return f"Not complete: {num_present} of {len(self.rows)} rows"
        return self.finding or self.question

    @property
    def contradictions(self) -> Sequence[str]:
        """Results that differ from a paper's, if no row is missing."""
        return self.contradicts if all(row.values for row in self.rows) else ()

    @cached_property
    def groups(self) -> dict[str | None, list[int]]:
        """Numbers of the rows of each group: rows without a group, then groups in table order."""
        members: dict[str | None, list[int]] = {}
        for name in dict.fromkeys([None, *(row.group for row in self.rows)]):
            numbers = [i for i, row in enumerate(self.rows) if row.group == name]
            if numbers:
                members[name] = numbers
        return members

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Comparisons of all rows with the best of their group and with full precision."""
        pairings = list(significance.pair_rows(self.rows, self.columns, self.groups))
        return significance.compare_paired_rows(pairings)

    @cached_property
    def marks(self) -> list[dict[str, Mark]]:
        """Marks of each row, by column."""
        return significance.mark_cells(self.rows, self.columns, self.groups, self.comparisons)

    @cached_property
    def sources(self) -> list[str]:
        """Sources of published numbers, in the order of their footnotes."""
        return list(dict.fromkeys(row.published.source for row in self.rows if row.published))

    def is_published(self, column: TableColumn) -> bool:
        """Return whether a paper reports this column for one of the rows."""
        return any(row.published and column.metric in row.published.values for row in self.rows)

    def is_small_set(self, i: int, column: TableColumn) -> bool:
        """Return whether a number is a set metric of too few images."""
        values = self.rows[i].values
        has_value = values.get(column.name) is not None
        return column.per_set and has_value and (values.get("n") or 0) < MIN_SET_SIZE

    def cell_mark(self, i: int, column: TableColumn) -> Mark:
        """Return the mark of a number."""
        return self.marks[i].get(column.name, Mark())

    def cell_signs(self, i: int, column: TableColumn) -> list[str]:
        """Return the signs that are printed behind a number. The legend explains them."""
        mark = self.cell_mark(i, column)
        arrow = {-1: "↓", 0: "", 1: "↑"}[mark.versus_reference]
        dagger = "†" if mark.indistinguishable else ""
        warning = "⚠" if self.is_small_set(i, column) else ""
        return [sign for sign in (dagger, arrow, warning) if sign]

    def row_numbers(self, i: int) -> dict[str, Any]:
        """Return all numbers of a row by CSV column, unrounded.

        They are its values, its differences from full precision and from the best of its group,
        and the published numbers.
        """
        row = self.rows[i]
        numbers: dict[str, Any] = dict(row.values)
        for comparison in self.comparisons:
            if comparison.row == i:
                suffix = "best_diff" if comparison.rival == BEST else "diff"
                name = f"{comparison.column.name}_{suffix}"
                numbers[name] = comparison.difference.mean
                numbers[f"{name}_low"] = comparison.difference.low
                numbers[f"{name}_high"] = comparison.difference.high
        published = row.published.values if row.published else {}
        for column in self.columns:
            if column.metric in published:
                theirs, ours = published[column.metric], row.values.get(column.name)
                numbers[f"{column.name}_published"] = theirs
                numbers[f"{column.name}_minus_published"] = None if ours is None else ours - theirs
        return numbers

    def format_legend(self, bold: str) -> str:
        """Return the explanation of the marks that occur, and of the test behind them."""
        marks: list[Mark] = []
        for row_marks in self.marks:
            marks += row_marks.values()
        count = len(self.comparisons)
        sentences = []
        if any(mark.best for mark in marks):
            sentences.append(f"{bold}: the best of its group.")
        if any(mark.indistinguishable for mark in marks):
            sentences.append("†: not distinguishable from it.")
        if any(mark.versus_reference for mark in marks):
            sentences.append("↓, ↑: worse, better than full precision.")
        if count:
            sentences.append(
                "Tested image by image of the same prompt and seed, by changing signs of the "
                f"differences ({significance.choose_num_resamples(count):,} times, or in all ways "
                f"there are; Student's t from {MIN_VALUES_FOR_T:,} images), at 5 % after Holm's "
                f"correction for the {count} comparisons of this table. Columns that are not means "
                "over images are not tested."
            )
        return " ".join(sentences)

    def format_footnotes(self, bold: str) -> list[str]:
        """Return the footnotes. `bold` is the legend's name of how the best number is printed."""
        footnotes = []
        if legend := self.format_legend(bold):
            footnotes.append(legend)
        if self._has_small_sets():
            footnotes.append(SMALL_SET_NOTE)
        footnotes += self.notes
        for column in self.columns:
            footnotes += [f"{column.title}: {text}." for text in self.column_notes(column)]
        for column in self.columns:
            for text in self.column_definitions(column):
                footnotes.append(f"{column.title}: {textwrap.shorten(text, MAX_DESCRIPTION)}")
        for number, source in enumerate(self.sources, 1):
            footnotes.append(f"[{number}] Published: {source}.")
        return footnotes + self._format_differences()

    def _format_differences(self) -> list[str]:
        """Return how methods differ from their authors' code: one footnote for equal lists."""
        labels: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            if row.differs:
                labels.setdefault(tuple(row.differs), []).append(row.label)
        footnotes = []
        for sentences, names in labels.items():
            listed = ", ".join(dict.fromkeys(names))
            footnotes.append(f"{listed}, beside the authors' code: {' '.join(sentences)}")
        return footnotes

    def _has_small_sets(self) -> bool:
        for column in self.columns:
            if any(self.is_small_set(i, column) for i in range(len(self.rows))):
                return True
        return False

    def column_notes(self, column: TableColumn) -> list[str]:
        """Return the remarks on a metric, each once for all rows."""
        return _collect_texts([row.notes for row in self.rows], column)

    def column_definitions(self, column: TableColumn) -> list[str]:
        """Return the definitions of a metric, each once for all rows."""
        return _collect_texts([row.about for row in self.rows], column)


def _collect_texts(texts: Sequence[Mapping[str, str]], column: TableColumn) -> list[str]:
    collected: dict[str, None] = {}
    for row_texts in texts:
        for name in (column.name, column.metric):
            if name in row_texts:
                collected[row_texts[name]] = None
    return list(collected)
