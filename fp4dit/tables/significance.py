"""Statistical comparison of a table's rows, image by image.

Each row is compared with the best of its group, and with full precision.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fp4dit.tables.rows import ScoredRow, TableColumn
from fp4dit.utils.statistics import (
    RESAMPLES,
    Interval,
    apply_holm_correction,
    compute_intervals,
    compute_p_values,
)

LEVEL = 0.05

BEST, REFERENCE = "best", "full precision"

Groups = Mapping[str | None, Sequence[int]]  # numbers of the rows of each group


@dataclass(frozen=True)
class Pairing:
    """Values of a row minus those of its rival, for the same images.

    Attributes:
        row: Number of the row.
        column: Column that is compared.
        rival: `BEST` of its group, or the `REFERENCE`.
        differences: Difference of each image.
    """

    row: int
    column: TableColumn
    rival: str
    differences: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Comparison:
    """Mean difference between a row and its rival, and its p-value.

    Attributes:
        row: Number of the row.
        column: Column that is compared.
        rival: `BEST` of its group, or the `REFERENCE`.
        difference: Mean of the row minus its rival, over images, with its interval.
        p: p-value, adjusted by Holm's correction for all comparisons of the table.

    Example:
        >>> column = TableColumn("psnr", "PSNR, dB", better="higher")
        >>> comparison = Comparison(1, column, BEST, Interval(-0.5, -0.8, -0.2), p=0.003)
        >>> comparison.differs, comparison.gains
        (True, False)
    """

    row: int
    column: TableColumn
    rival: str
    difference: Interval
    p: float

    @property
    def differs(self) -> bool:
        """True if the difference is significant."""
        return self.p < LEVEL

    @property
    def gains(self) -> bool:
        """True if the row is better than its rival."""
        return (self.difference.mean > 0) == (self.column.better == "higher")


@dataclass(frozen=True)
class Mark:
    """Marks of a number.

    Attributes:
        best: It is the best of its group.
        indistinguishable: It does not differ significantly from the best of its group.
        versus_reference: -1 if it is significantly worse than full precision, 1 if better, else 0.
    """

    best: bool = False
    indistinguishable: bool = False
    versus_reference: int = 0


def list_comparable_groups(groups: Groups, rows: Sequence[ScoredRow]) -> Iterator[list[int]]:
    """Yield the groups whose rows are compared: those with a name and no missing row."""
    for name, members in groups.items():
        if name is not None and len(members) > 1 and all(rows[i].values for i in members):
            yield list(members)


def find_best_rows(
    rows: Sequence[ScoredRow], members: Sequence[int], column: TableColumn
) -> list[int]:
    """Return the rows with the best value; none if fewer than two rows have a value."""
    values: dict[int, float] = {}
    for i in members:
        value = rows[i].values.get(column.name)
        if value is not None:
            values[i] = value
    if len(values) < 2:
        return []
    best = max(values.values()) if column.better == "higher" else min(values.values())
    return [i for i, value in values.items() if value == best]


def subtract_paired(row: ScoredRow, rival: ScoredRow, name: str) -> Float[np.ndarray, " n"] | None:
    """Return the differences of two rows, image by image.

    They are None if the rows have other prompts or seeds, or if a value is missing.
    """
    if not row.images or row.images != rival.images:
        return None
    sides = []
    for side in (row, rival):
        values = [value for value in side.per_image.get(name, ()) if value is not None]
        if len(values) != len(row.images):
            return None
        sides.append(np.asarray(values, np.float64))
    return sides[0] - sides[1]


def pair_rows(
    rows: Sequence[ScoredRow], columns: Sequence[TableColumn], groups: Groups
) -> Iterator[Pairing]:
    """Pair every row with the best of its group, and with full precision if that has values."""
    reference = next((row for row in rows if row.reference and row.values), None)
    for column in columns:
        if not column.better or not column.per_image:
            continue
        for members in list_comparable_groups(groups, rows):
            best = find_best_rows(rows, members, column)
            for i in members:
                if best and i not in best:
                    differences = subtract_paired(rows[i], rows[best[0]], column.name)
                    if differences is not None:
                        yield Pairing(i, column, BEST, differences)
        for i, row in enumerate(rows):
            if reference and row is not reference:
                differences = subtract_paired(row, reference, column.name)
                if differences is not None:
                    yield Pairing(i, column, REFERENCE, differences)


def compare_paired_rows(pairings: Sequence[Pairing]) -> list[Comparison]:
    """Test all pairings of a table together.

    Pairings with the same number of images are resampled at once.
    """
    resamples = choose_num_resamples(len(pairings))
    intervals: dict[int, Interval] = {}
    p_values: dict[int, float] = {}
    for count in sorted({len(pairing.differences) for pairing in pairings}):
        same_size = [k for k, pair in enumerate(pairings) if len(pair.differences) == count]
        data = np.stack([pairings[k].differences for k in same_size])
        intervals |= zip(same_size, compute_intervals(data), strict=True)
        p_values |= zip(same_size, compute_p_values(data, resamples), strict=True)
    adjusted = apply_holm_correction([p_values[k] for k in range(len(pairings))])
    comparisons = []
    for k, pair in enumerate(pairings):
        comparisons.append(Comparison(pair.row, pair.column, pair.rival, intervals[k], adjusted[k]))
    return comparisons


def choose_num_resamples(num_comparisons: int) -> int:
    """Return the number of resamples of each test, which grows with the number of comparisons.

    The smallest p-value is about 1 / resamples, and Holm's correction multiplies it by up to
    `num_comparisons`. The product must be able to fall below `LEVEL`.
    """
    return max(RESAMPLES, 200 * num_comparisons)


def mark_cells(
    rows: Sequence[ScoredRow],
    columns: Sequence[TableColumn],
    groups: Groups,
    comparisons: Sequence[Comparison],
) -> list[dict[str, Mark]]:
    """Return the marks of each row, by column."""
    best = set()
    for column in columns:
        if column.better:
            for members in list_comparable_groups(groups, rows):
                best |= {(i, column.name) for i in find_best_rows(rows, members, column)}
    indistinguishable = set()
    versus_reference = {}
    for comparison in comparisons:
        cell = (comparison.row, comparison.column.name)
        if comparison.rival == BEST and not comparison.differs:
            indistinguishable.add(cell)
        if comparison.rival == REFERENCE and comparison.differs:
            versus_reference[cell] = 1 if comparison.gains else -1
    marks = []
    for i in range(len(rows)):
        row_marks = {}
        for column in columns:
            cell = (i, column.name)
            row_marks[column.name] = Mark(
                cell in best, cell in indistinguishable, versus_reference.get(cell, 0)
            )
        marks.append(row_marks)
    return marks
