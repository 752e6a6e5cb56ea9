"""Which rows of a table differ, image by image, from the best of their group and from full precision."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fp4dit.rows import Column, Row
from fp4dit.statistics import RESAMPLES, Interval, holm, intervals, p_values

LEVEL = 0.05
BEST, REFERENCE = "best", "full precision"


@dataclass(frozen=True)
class Pairing:
    """A row beside the `rival` it is held against: the best of its group, or full precision."""

    row: int
    column: Column
    rival: str
    differences: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Comparison:
    """How much larger a row's mean is than its rival's, and whether that is more than chance: `p` is after Holm's
    correction for all comparisons of the table."""

    row: int
    column: Column
    rival: str
    difference: Interval
    p: float

    @property
    def differs(self) -> bool:
        return self.p < LEVEL

    @property
    def gains(self) -> bool:
        return (self.difference.mean > 0) == (self.column.better == "higher")


@dataclass(frozen=True)
class Mark:
    """What is said of a number. `against` is -1 where it is worse than full precision, 1 where it is better."""

    best: bool = False
    equal: bool = False
    against: int = 0


def judged(groups: Mapping[str | None, Sequence[int]], rows: Sequence[Row]) -> Iterator[list[int]]:
    """The groups whose rows are held against each other: those with a name and no row missing."""
    for name, members in groups.items():
        if name is not None and len(members) > 1 and all(rows[i].values for i in members):
            yield list(members)


def best(rows: Sequence[Row], members: Sequence[int], column: Column) -> list[int]:
    """The rows with the very best value; none where fewer than two have one."""
    values = {i: value for i in members if (value := rows[i].values.get(column.name)) is not None}
    if len(values) < 2:
        return []
    top = (max if column.better == "higher" else min)(values.values())
    return [i for i, value in values.items() if value == top]


def paired(row: Row, rival: Row, name: str) -> Float[np.ndarray, " n"] | None:
    """Differences between images of the same prompts and seeds; None where these differ, or a value is missing."""
    sides = [[v for v in r.per_image.get(name, ()) if v is not None] for r in (row, rival)]
    if not row.images or row.images != rival.images or not all(len(side) == len(row.images) for side in sides):
        return None
    return np.asarray(sides[0], np.float64) - np.asarray(sides[1], np.float64)


def pairings(
    rows: Sequence[Row], columns: Sequence[Column], groups: Mapping[str | None, Sequence[int]]
) -> Iterator[Pairing]:
    """Every row against the best of its group, and against full precision where that has images of its own."""
    reference = next((row for row in rows if row.reference and row.values), None)
    for column in (c for c in columns if c.better and c.interval):
        for members in judged(groups, rows):
            top = best(rows, members, column)
            for i in members:
                if top and i not in top and (found := paired(rows[i], rows[top[0]], column.name)) is not None:
                    yield Pairing(i, column, BEST, found)
        for i, row in enumerate(rows):
            if reference and row is not reference and (found := paired(row, reference, column.name)) is not None:
                yield Pairing(i, column, REFERENCE, found)


def compared(given: Sequence[Pairing]) -> list[Comparison]:
    """All of them at once: enough resamples that the smallest p times their number can be small."""
    found: dict[int, tuple[Interval, float]] = {}
    for count in sorted({len(pairing.differences) for pairing in given}):
        which = [k for k, pairing in enumerate(given) if len(pairing.differences) == count]
        data = np.stack([given[k].differences for k in which])
        found |= zip(which, zip(intervals(data), p_values(data, resamples(len(given))), strict=True), strict=True)
    adjusted = holm([found[k][1] for k in range(len(given))])
    return [Comparison(g.row, g.column, g.rival, found[k][0], adjusted[k]) for k, g in enumerate(given)]


def resamples(comparisons: int) -> int:
    return max(RESAMPLES, 200 * comparisons)


def marks(
    rows: Sequence[Row],
    columns: Sequence[Column],
    groups: Mapping[str | None, Sequence[int]],
    comparisons: Sequence[Comparison],
) -> list[dict[str, Mark]]:
    """For each row the mark of each column that may be compared."""
    tops = {
        (i, c.name) for c in columns if c.better for members in judged(groups, rows) for i in best(rows, members, c)
    }
    equal = {(c.row, c.column.name) for c in comparisons if c.rival == BEST and not c.differs}
    against = {(c.row, c.column.name): 1 if c.gains else -1 for c in comparisons if c.rival == REFERENCE and c.differs}
    return [
        {c.name: Mark(at in tops, at in equal, against.get(at, 0)) for c in columns for at in [(i, c.name)]}
        for i in range(len(rows))
    ]
