"""Sentences that say what the numbers of a table mean."""

from collections.abc import Iterator, Sequence

from fp4dit.tables.rows import ScoredRow, TableColumn, choose_order_column
from fp4dit.tables.significance import BEST, Pairing, compare_paired_rows, subtract_paired
from fp4dit.tables.table import Table
from fp4dit.utils.formatting import format_bytes

SIZE = "checkpoint_bytes"


def summarize_table(table: Table) -> list[str]:
    """Return sentences about quality, about differences that may be chance, and about size.

    Each is computed from the rows that have numbers. One that they do not allow is left out.

    Example:
        >>> summarize_table(Table(rows, columns))[2]
        'The packed transformer takes 3.7 MB, where 16 bits take 14.0 MB: 26 %.'
    """
    sentences = []
    if column := choose_order_column(table.columns):
        rows = [row for row in table.rows if not row.reference]
        rows = [row for row in rows if row.values.get(column.name) is not None]
        rows.sort(key=lambda row: row.values[column.name] or 0, reverse=column.better == "higher")
        sentences += [*describe_quality(rows, column), *describe_differences(rows, column)]
    return [*sentences, *describe_sizes(table.rows)]


def describe_quality(rows: Sequence[ScoredRow], column: TableColumn) -> Iterator[str]:
    """Yield a sentence about the best and the worst row.

    Args:
        rows: Rows with a value in the column, the best first.
        column: The column.
    """
    name, _, unit = column.title.partition(", ")
    if column.compares_to_reference:
        name += " against full precision"
    values = []
    for row in rows:
        text = column.format_number(row.values[column.name] or 0)
        values.append(f"{text} {unit}".rstrip())
    if len(rows) == 1:
        yield f"By {name}, {quote_labels(rows)} has {values[0]}."
    elif len(rows) > 1 and values[0] == values[-1]:
        yield f"By {name}, all {len(rows)} rows have {values[0]}."
    elif len(rows) > 1:
        best = [row for row, value in zip(rows, values, strict=True) if value == values[0]]
        worst = [row for row, value in zip(rows, values, strict=True) if value == values[-1]]
        yield (
            f"By {name}, the best is {quote_labels(best)} with {values[0]}, and the worst is "
            f"{quote_labels(worst)} with {values[-1]}."
        )


def describe_differences(rows: Sequence[ScoredRow], column: TableColumn) -> Iterator[str]:
    """Yield a sentence about the rows that may be as good as the best one.

    Args:
        rows: Rows with a value in the column, the best first.
        column: The column.
    """
    pairings = []
    for number, row in enumerate(rows[1:], 1):
        differences = subtract_paired(row, rows[0], column.name)
        if differences is not None:
            pairings.append(Pairing(number, column, BEST, differences))
    if not pairings:
        return
    best, test = quote_labels(rows[:1]), "image by image, at 5 % after Holm's correction"
    equal = [rows[item.row] for item in compare_paired_rows(pairings) if not item.differs]
    num_worse = len(pairings) - len(equal)
    worse = "one other is" if num_worse == 1 else f"{num_worse} others are"
    if not equal:
        sentence = f"Than {best}, {worse} significantly worse"
    else:
        sentence = f"{quote_labels(equal)} cannot be told from {best}"
        if num_worse:
            sentence += f", and {worse} significantly worse"
    yield f"{sentence} ({test})."


def describe_sizes(rows: Sequence[ScoredRow]) -> Iterator[str]:
    """Yield a sentence about the sizes of the packed transformers."""
    sizes = sorted(row.values[SIZE] or 0 for row in rows if row.values.get(SIZE))
    full = next((row.values.get(SIZE) for row in rows if row.reference), None)
    packed = [size for size in sizes if size != full]
    if not packed:
        return
    least, most = format_bytes(packed[0]), format_bytes(packed[-1])
    sentence = f"The packed transformer takes {least}"
    if least != most:
        sentence += f" to {most}"
    if full:
        shares = [f"{100 * size / full:.0f}" for size in (packed[0], packed[-1])]
        share = " to ".join(dict.fromkeys(shares))
        sentence += f", where 16 bits take {format_bytes(full)}: {share} %"
    yield f"{sentence}."


def quote_labels(rows: Sequence[ScoredRow]) -> str:
    """Return the labels of rows, in quotation marks, because they may contain commas."""
    *labels, last = [f"“{row.label}”" for row in rows]
    return f"{', '.join(labels)} and {last}" if labels else last
