"""Batches of rows with equal shapes, and columns with rows of several shapes."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from fp4dit.data.columns import (
    DiskTensor,
    MemoryBudget,
    RowSource,
    RowSubset,
    SegmentedRows,
    write_rows,
)

Columns = dict[str, Tensor | DiskTensor | SegmentedRows]


def find_stops(columns: Mapping[str, RowSource]) -> tuple[int, ...]:
    """Return the number of the row after each segment of the columns, which all have the same."""
    first = next(iter(columns.values()))
    return first.stops if isinstance(first, SegmentedRows) else (len(first),)


def split_index(
    columns: Mapping[str, RowSource], index: Int[Tensor, "n"]
) -> Iterator[Int[Tensor, "m"]]:
    """Yield the rows of an index segment by segment, each in its order."""
    stops = find_stops(columns)
    if len(stops) == 1:
        yield index
        return
    owners = torch.bucketize(index, torch.tensor(stops), right=True)
    for owner in owners.unique():
        yield index[owners == owner]


def iter_batches(
    columns: Mapping[str, RowSource], index: Int[Tensor, "n"], size: int
) -> Iterator[Int[Tensor, "b"]]:
    """Yield the rows of an index in batches of equal shapes, segment by segment."""
    for part in split_index(columns, index):
        yield from part.split(size)


def iter_slices(stops: Sequence[int], first: int, size: int) -> Iterator[slice]:
    """Yield the rows from `first` on in slices of at most `size` that lie within one segment."""
    for stop in stops:
        for start in range(first, stop, size):
            yield slice(start, min(start + size, stop))
        first = max(first, stop)


def select_subset_of(column: RowSource, rows: Int[Tensor, "n"]) -> RowSource:
    """Return some rows of a column, which are read when they are used.

    Args:
        column: The column.
        rows: The numbers of the rows, in ascending order.
    """
    if not isinstance(column, SegmentedRows):
        return RowSubset(column, rows)
    starts = dict(zip(column.stops, (0, *column.stops), strict=False))
    parts = []
    for part, segment in zip(column.segments, starts.items(), strict=True):
        stop, start = segment
        inside = rows[(rows >= start) & (rows < stop)]
        if len(inside):
            parts.append(RowSubset(part, inside - start))
    return SegmentedRows(parts)


def add_rows(
    columns: Columns,
    name: str,
    start: int,
    rows: Shaped[Tensor, "n ..."],
    stops: Sequence[int],
    memory: MemoryBudget,
) -> None:
    """Write rows to a column that is filled in order, and make room for it where a segment begins.

    Args:
        columns: The columns, to which the column is added with its first rows.
        name: The name of the column.
        start: The number of the first row.
        rows: The rows, which lie within one segment.
        stops: The number of the row after each segment.
        memory: The budget for the column.
    """
    begins = (0, *stops)
    if start in begins:
        count = stops[begins.index(start)] - start
        segment = memory.allocate(torch.Size([count, *rows.shape[1:]]), rows.dtype)
        if len(stops) == 1:
            columns[name] = segment
        else:
            earlier = columns[name].segments if start else ()  # pyright: ignore
            columns[name] = SegmentedRows([*earlier, segment])
    write_rows(columns[name], start, rows)
