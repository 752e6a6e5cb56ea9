"""Rows of calibration data, one for each captured call: in memory, or in files if too large."""

import mmap
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

RowIndex = slice | Int[Tensor, "n"]


@runtime_checkable
class RowSource(Protocol):
    """Protocol of rows in memory or in files, which are indexed like a tensor. A tensor is one.

    Example:
        >>> isinstance(torch.zeros(4, 64), RowSource)
        True
    """

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: RowIndex, /) -> Shaped[Tensor, "n ..."]:
        """Read some rows to memory."""
        ...


class DiskTensor:
    """Tensor in a temporary file without a name.

    The file disappears with the object or the process. Rows are copied out of a temporary memory
    map when they are read, so that no page of the file stays mapped.

    Args:
        folder: The folder on whose disk the file lies; None for the system's temporary folder.
        shape: The shape of the tensor, with the number of rows first.
        dtype: The dtype of the tensor.

    Example:
        >>> tensor = DiskTensor(Path("/scratch"), torch.Size([1000, 64]), torch.float32)
        >>> tensor.write(0, torch.ones(10, 64))
        >>> tensor[2:5].shape
        torch.Size([3, 64])
    """

    def __init__(self, folder: Path | None, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        # The file is open as long as this object exists.
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self.file.truncate(shape.numel() * dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, start: int, rows: Shaped[Tensor, "n ..."]) -> None:
        """Write consecutive rows, from row `start` on."""
        self.file.seek(start * rows[0].nbytes)
        remaining = rows.contiguous().flatten().view(torch.uint8).numpy().data
        # NumPy's tofile is not used, because its error does not say that the disk is full.
        while remaining:
            remaining = remaining[self.file.write(remaining) :]

    def __getitem__(self, index: RowIndex) -> Shaped[Tensor, "n ..."]:
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        rows = torch.frombuffer(mapped, dtype=self.dtype).view(self.shape)
        return rows[index].clone() if isinstance(index, slice) else rows[index]


@dataclass(frozen=True)
class RowSubset:
    """The rows `index` of `source`, which are read when they are used.

    Attributes:
        source: The rows to choose from.
        index: The numbers of the rows in `source`.

    Example:
        >>> RowSubset(torch.arange(10), torch.tensor([2, 3, 5]))[:2]
        tensor([2, 3])
    """

    source: RowSource
    index: Int[Tensor, "n"]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.source.shape[1:]])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: RowIndex) -> Shaped[Tensor, "n ..."]:
        return self.source[self.index[index]]


@dataclass(frozen=True)
class SegmentedRows:
    """Rows whose shapes differ, as segments that each have rows of one shape.

    Rows of different segments can be read at once only if their shapes are equal.

    Attributes:
        segments: The rows of each segment.

    Example:
        >>> rows = SegmentedRows([torch.zeros(3, 7), torch.zeros(2, 9)])
        >>> len(rows), rows.stops, rows[3:5].shape
        (5, (3, 5), torch.Size([2, 9]))
    """

    segments: Sequence[RowSource]

    @property
    def shape(self) -> torch.Size:
        """The shape of the column, with the row shape of its first segment."""
        return torch.Size([len(self), *self.segments[0].shape[1:]])

    @property
    def stops(self) -> tuple[int, ...]:
        """The number of the row after each segment."""
        return tuple(accumulate(map(len, self.segments)))

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    def __getitem__(self, index: RowIndex) -> Shaped[Tensor, "n ..."]:
        numbers = torch.arange(len(self))[index] if isinstance(index, slice) else index
        if not len(numbers):
            return self.segments[0][:0]
        owners = torch.bucketize(numbers, torch.tensor(self.stops), right=True)
        parts, places = [], []
        for owner in owners.unique().tolist():
            start = (0, *self.stops)[owner]
            place = (owners == owner).nonzero().flatten()
            parts.append(self.segments[owner][numbers[place] - start])
            places.append(place)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(places).argsort()]


@dataclass
class MemoryBudget:
    """A budget of host memory for calibration data. Tensors that exceed it are placed in files.

    Args:
        limit_bytes: The budget in bytes.
        folder: The folder on whose disk the files lie; None for the system's temporary folder.
        used_bytes: The memory that is in use. It falls when a tensor is deleted.

    Example:
        >>> memory = MemoryBudget(limit_bytes=10**9, folder=Path("/scratch"))
        >>> column = memory.allocate(torch.Size([1000, 64]), torch.float32)
        >>> write_rows(column, 0, torch.ones(10, 64))
    """

    limit_bytes: int | float = float("inf")
    folder: Path | None = None
    used_bytes: int = 0

    def allocate(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | DiskTensor:
        """Return a column without content, to be filled by `write_rows`."""
        size = shape.numel() * dtype.itemsize
        if self.used_bytes + size > self.limit_bytes:
            return DiskTensor(self.folder, shape, dtype)
        self.used_bytes += size
        column = torch.empty(shape, dtype=dtype)
        weakref.finalize(column, self.release, size)
        return column

    def gather(self, count: int, parts: Iterable[Shaped[Tensor, "n ..."]]) -> RowSource | None:
        """Concatenate parts, from any device, to a column of at most `count` rows.

        Returns:
            The column, or None if there is no part.
        """
        segments = []
        # Parts of equal shapes follow one another.
        for shape, equal in groupby(parts, lambda part: part.shape[1:]):
            column, start = None, 0
            for part in equal:
                if column is None:
                    column = self.allocate(torch.Size([count, *shape]), part.dtype)
                write_rows(column, start, part.cpu())
                start += len(part)
            assert column is not None
            is_full = start == count
            segments.append(column if is_full else RowSubset(column, torch.arange(start)))
        if len(segments) < 2:
            return segments[0] if segments else None
        return SegmentedRows(segments)

    def release(self, size: int) -> None:
        """Subtract the bytes of a deleted column from the memory in use."""
        self.used_bytes -= size

    def load(self, column: RowSource, batch_size: int = 64) -> RowSource:
        """Return the column in memory if the budget allows it; otherwise return it unchanged."""
        if isinstance(column, SegmentedRows):
            return SegmentedRows([self.load(part, batch_size) for part in column.segments])
        first = column[:1]
        if self.used_bytes + first.nbytes * len(column) > self.limit_bytes:
            return column
        loaded = self.allocate(column.shape, first.dtype)
        for start in range(0, len(column), batch_size):
            write_rows(loaded, start, column[start : start + batch_size])
        return loaded


def write_rows(
    column: Tensor | DiskTensor | SegmentedRows, start: int, rows: Shaped[Tensor, "n ..."]
) -> None:
    """Write consecutive rows of a column, from row `start` on. They lie within one segment."""
    if isinstance(column, Tensor):
        column[start : start + len(rows)] = rows
    elif isinstance(column, DiskTensor):
        column.write(start, rows)
    else:
        for segment in column.segments:
            if start < len(segment):
                write_rows(segment, start, rows)  # pyright: ignore[reportArgumentType]
                return
            start -= len(segment)
