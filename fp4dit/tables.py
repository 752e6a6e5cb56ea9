"""Rows of results as Markdown to read, CSV to compute with, and LaTeX to publish."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fp4dit.errors import UserError
from fp4dit.statistics import difference

Value = float | int | None
BEST, EQUAL, PLAIN = "best", "not distinguishable from the best", ""
MARKDOWN = {BEST: "**{}**", EQUAL: "{}†", PLAIN: "{}"}
LATEX = {BEST: r"\mathbf{{{}}}", EQUAL: r"{}^\dagger", PLAIN: "{}"}
LEGEND = (
    "Bold: the best of its group. †: not distinguishable from it at 95 %, image by image of the same prompt and seed "
    "(bootstrap of the mean difference, each row against the best alone). What is no mean over images has no †."
)


@dataclass(frozen=True)
class Column:
    """A number and how it is printed: `value * factor` with `digits` decimals.

    `interval` is true of means over images, which have a `_low` and a `_high` beside them. `better` is "higher" or
    "lower" where rows may be compared by it.

    Raises:
        UserError: if `better` is another word.
    """

    name: str
    title: str
    digits: int = 1
    factor: float = 1.0
    interval: bool = False
    better: str | None = None

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", None):
            raise UserError(f"column {self.name}: better is higher or lower, not {self.better!r}")

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_low", f"{self.name}_high") if self.interval else (self.name,)

    def number(self, value: Value) -> str:
        return "–" if value is None else f"{value * self.factor:.{self.digits}f}"

    def text(self, values: Mapping[str, Value], template: str = "{}") -> str:
        mean, *ends = (values.get(key) for key in self.keys)
        interval = f" [{', '.join(map(self.number, ends))}]" if ends and None not in ends else ""
        return template.format(self.number(mean)) + interval

    def tex(self, values: Mapping[str, Value], template: str = "{}") -> str:
        mean, *ends = (values.get(key) for key in self.keys)
        if mean is None:
            return "--"
        number = template.format(self.number(mean))
        if not ends or ends[0] is None or ends[1] is None:
            return f"${number}$"
        return f"${number} \\pm {self.number((ends[1] - ends[0]) / 2)}$"


@dataclass(frozen=True)
class Row:
    """A label and its numbers by CSV column; none at all where the result is missing.

    `images` says which prompt and seed each of `per_image`'s values belongs to.
    """

    label: str
    values: Mapping[str, Value]
    group: str | None = None
    per_image: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    images: Sequence[Any] = ()


def row(label: str, metrics: Mapping[str, Any], group: str | None = None, images: Sequence[Any] = ()) -> Row:
    """From what the score stage leaves in metrics.json, and the generate stage in images.json."""
    values: dict[str, Value] = {"n": metrics["n"], **metrics["scalars"]}
    for name, metric in metrics["metrics"].items():
        mean = metric or {"mean": None, "low": None, "high": None}
        values |= {name: mean["mean"], f"{name}_low": mean["low"], f"{name}_high": mean["high"]}
    return Row(label, values, group, metrics.get("per_image", {}), images)


@dataclass(frozen=True)
class Table:
    """Rows, and what they say. `finding` and `contradicts` (of the papers) are written by whoever has read the
    numbers, so they stand in no table that lacks one of its rows.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    question: str = ""
    finding: str = ""
    contradicts: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def heading(self) -> str:
        there = sum(bool(r.values) for r in self.rows)
        if there < len(self.rows):
            return f"Not complete: {there} of {len(self.rows)} rows"
        return self.finding or self.question

    @property
    def against_papers(self) -> Sequence[str]:
        return self.contradicts if all(r.values for r in self.rows) else ()

    @property
    def footnotes(self) -> list[str]:
        marked = any(mark for marks in self.marks for mark in marks.values())
        return [*([LEGEND] if marked else []), *self.notes]

    @cached_property
    def groups(self) -> dict[str | None, list[int]]:
        """Which rows each group has, in the order of its first row; those without one come first, if any."""
        names = dict.fromkeys([None, *(r.group for r in self.rows)])
        found = {name: [i for i, r in enumerate(self.rows) if r.group == name] for name in names}
        return {name: members for name, members in found.items() if members}

    @cached_property
    def marks(self) -> list[dict[str, str]]:
        """For each row the mark of each column. A row without a group, or whose group lacks a row, bears none."""
        found: list[dict[str, str]] = [{} for _ in self.rows]
        for name, members in self.groups.items():
            rivals = [self.rows[i] for i in members]
            if name is None or len(rivals) < 2 or not all(r.values for r in rivals):
                continue
            for column in (c for c in self.columns if c.better):
                for i, mark in zip(members, compare(rivals, column), strict=True):
                    found[i][column.name] = mark
        return found

    def cells(self, i: int, form: Callable[..., str], templates: Mapping[str, str]) -> list[str]:
        """Row `i` as text: `form` prints a column's value into the template of its mark."""
        marks, values = self.marks[i], self.rows[i].values
        return [form(column, values, templates[marks.get(column.name, PLAIN)]) for column in self.columns]


def compare(rows: Sequence[Row], column: Column) -> list[str]:
    """The mark of each row. Rows with the very best value are all best."""
    values = [r.values.get(column.name) for r in rows]
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return [PLAIN] * len(rows)
    top = max(known) if column.better == "higher" else min(known)
    best = rows[values.index(top)]
    return [
        BEST if value == top else EQUAL if indistinguishable(r, best, column.name) else PLAIN
        for r, value in zip(rows, values, strict=True)
    ]


def indistinguishable(a: Row, b: Row, name: str) -> bool:
    """Whether the images, drawn from the same prompts and seeds, leave open which row is better."""
    values, others = ([v for v in r.per_image.get(name, ()) if v is not None] for r in (a, b))
    if not a.images or a.images != b.images or not len(values) == len(others) == len(a.images):
        return False
    found = difference(values, others)
    return found.low <= 0 <= found.high


def markdown(table: Table) -> str:
    columns = table.columns
    lines = [["", *(c.title for c in columns)], ["---", *("---:" for _ in columns)]]
    for name, members in table.groups.items():
        if name is not None:
            lines.append([f"**{name}**", *("" for _ in columns)])
        lines += [[table.rows[i].label, *table.cells(i, Column.text, MARKDOWN)] for i in members]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, width in enumerate(widths[1:], 1):
        lines[1][i] = "-" * (width - 1) + ":"
    lines[1][0] = "-" * max(3, widths[0])
    pad = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    grid = "".join("| " + " | ".join(pad(i, cell) for i, cell in enumerate(line)) + " |\n" for line in lines)
    heading = [f"### {table.heading}\n"] if table.heading else []
    against = "".join(f"- {sentence}\n" for sentence in table.against_papers)
    contradictions = ["Not as in the papers:\n", against] if against else []
    return "\n".join([*heading, grid, *contradictions, *(f"{note}\n" for note in table.footnotes)])


def as_csv(table: Table) -> str:
    """Unrounded, in the units of metrics.json; a missing value is an empty cell. The group stands behind the label,
    if the table has groups."""
    grouped = any(table.groups)
    keys = [key for column in table.columns for key in column.keys]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", *(["group"] if grouped else []), *keys])
    for i in (i for members in table.groups.values() for i in members):
        r = table.rows[i]
        group = [r.group or ""] if grouped else []
        writer.writerow([r.label, *group, *("" if (v := r.values.get(key)) is None else v for key in keys)])
    return file.getvalue()


def latex(table: Table) -> str:
    """A tabular for booktabs; means only, with half the width of the interval behind them.

    What is no number is a comment, for the caption to be written from.
    """
    columns = table.columns
    head = " & ".join(["", *(escape(c.title) for c in columns)])
    parts = []
    for name, members in table.groups.items():
        title = f"\\multicolumn{{{1 + len(columns)}}}{{l}}{{\\textit{{{escape(name)}}}}} \\\\\n" if name else ""
        cells = [[escape(table.rows[i].label), *table.cells(i, Column.tex, LATEX)] for i in members]
        parts.append(title + "".join(" & ".join(line) + r" \\" + "\n" for line in cells))
    body, shape = "\\midrule\n".join(parts), "l" + "r" * len(columns)
    comment = lambda texts: "".join(f"% {' '.join(text.split())}\n" for text in texts if text)
    return (
        f"{comment([table.heading])}\\begin{{tabular}}{{{shape}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}"
        f"\\bottomrule\n\\end{{tabular}}\n{comment([*table.against_papers, *table.footnotes])}"
    )


def escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
