"""Rows of results as Markdown to read, CSV to compute with, and LaTeX to publish."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = float | int | None


@dataclass(frozen=True)
class Column:
    """A number and how it is printed: `value * factor` with `digits` decimals.

    `interval` is true of means over images, which have a `_low` and a `_high` beside them.
    """

    name: str
    title: str
    digits: int = 1
    factor: float = 1.0
    interval: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_low", f"{self.name}_high") if self.interval else (self.name,)

    def number(self, value: Value) -> str:
        return "–" if value is None else f"{value * self.factor:.{self.digits}f}"

    def text(self, values: Mapping[str, Value]) -> str:
        mean, *ends = (values.get(key) for key in self.keys)
        interval = f" [{', '.join(map(self.number, ends))}]" if ends and None not in ends else ""
        return self.number(mean) + interval


@dataclass(frozen=True)
class Row:
    """A label and its numbers by CSV column; none at all where the result is missing."""

    label: str
    values: Mapping[str, Value]


def row(label: str, metrics: Mapping[str, Any]) -> Row:
    """From what the score stage leaves in metrics.json."""
    values: dict[str, Value] = {"n": metrics["n"], **metrics["scalars"]}
    for name, metric in metrics["metrics"].items():
        mean = metric or {"mean": None, "low": None, "high": None}
        values |= {name: mean["mean"], f"{name}_low": mean["low"], f"{name}_high": mean["high"]}
    return Row(label, values)


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [["", *(c.title for c in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[r.label, *(c.text(r.values) for c in columns)] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, width in enumerate(widths[1:], 1):
        lines[1][i] = "-" * (width - 1) + ":"
    lines[1][0] = "-" * max(3, widths[0])
    pad = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    return "".join("| " + " | ".join(pad(i, cell) for i, cell in enumerate(line)) + " |\n" for line in lines)


def as_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Unrounded, in the units of metrics.json; a missing value is an empty cell."""
    keys = [key for column in columns for key in column.keys]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", *keys])
    writer.writerows([r.label, *("" if (v := r.values.get(key)) is None else v for key in keys)] for r in rows)
    return file.getvalue()


def latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A tabular for booktabs; means only, with half the width of the interval behind them."""
    head = " & ".join(["", *(escape(c.title) for c in columns)])
    body = "".join(" & ".join([escape(r.label), *(tex(c, r.values) for c in columns)]) + r" \\" + "\n" for r in rows)
    shape = "l" + "r" * len(columns)
    return f"\\begin{{tabular}}{{{shape}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def tex(column: Column, values: Mapping[str, Value]) -> str:
    mean, *ends = (values.get(key) for key in column.keys)
    if mean is None:
        return "--"
    if not ends or ends[0] is None or ends[1] is None:
        return f"${column.number(mean)}$"
    return f"${column.number(mean)} \\pm {column.number((ends[1] - ends[0]) / 2)}$"


def escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
