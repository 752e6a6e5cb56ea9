"""Rows of calibration data, one for each captured call: in memory, or in files if too large."""

import json
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from safetensors import safe_open
from torch import Tensor

RowIndex = slice | Int[Tensor, "n"]

# The place of a row in captured calls: the file, the group of calls in it, the step, and the number
# within the step.
RowLocation = tuple[Path, str, int, int]

# A column of captured calls that says of which kind the call of each row is. Rows of one kind have
# equal shapes.
CALL_KIND = "call_kind"


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


@dataclass(frozen=True)
class CapturedTensor:
    """Input of the captured calls, read from the files of `captured_calls.save_calls`.

    Args:
        name: The name of the input in the files.
        locations: The place of each row.
        row_shape: The shape of one row.

    Example:
        >>> open_captured_calls(Path("outputs/store/capture/0123/calls"))["latent"][:4].shape
        torch.Size([4, 4, 64, 64])
    """

    name: str
    locations: Sequence[RowLocation]
    row_shape: torch.Size

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.row_shape])

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: RowIndex) -> Shaped[Tensor, "n ..."]:
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return torch.stack(list(self.iter_rows([self.locations[i] for i in numbers])))

    def iter_rows(self, locations: Sequence[RowLocation]) -> Iterator[Tensor]:
        """Read rows one by one. Each file is opened once for consecutive rows."""
        for path, group in groupby(locations, lambda location: location[0]):
            with safe_open(path, "pt") as file:
                for prefix, in_group in groupby(group, lambda location: location[1]):
                    values = file.get_slice(prefix + self.name)
                    # A constant input is written once for all steps.
                    is_constant = len(values.get_shape()) == 1 + len(self.row_shape)
                    for _, _, step, row in in_group:
                        yield values[row : row + 1][0] if is_constant else values[step, row]


def open_captured_calls(folder: Path) -> dict[str, RowSource]:
    """Return every input of the captured calls, with one row per call, by kind, file and step."""
    locations: dict[int, list[RowLocation]] = {}
    row_shapes: dict[int, dict[str, torch.Size]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            for prefix, group in about.get("groups", {"": about}).items():
                names = [name for name in file.keys() if name.startswith(prefix)]
                counts, shapes = set(), {}
                for name in names:
                    shape = file.get_slice(name).get_shape()
                    name = name.removeprefix(prefix)
                    count, *row = shape if name in group["constant"] else shape[1:]
                    shapes[name] = torch.Size(row)
                    counts.add(count)
                [count] = counts  # all inputs have the same number of rows
                kind = 0
                if CALL_KIND in shapes:
                    kind = int(file.get_tensor(prefix + CALL_KIND).flatten()[0])
                row_shapes[kind] = shapes
                places = locations.setdefault(kind, [])
                for step in range(group["steps"]):
                    places += [(path, prefix, step, row) for row in range(count)]
    columns: dict[str, RowSource] = {}
    for name in dict.fromkeys(chain.from_iterable(row_shapes.values())):
        segments: list[RowSource] = []
        for kind, places in locations.items():
            if name in row_shapes[kind]:
                segments.append(CapturedTensor(name, places, row_shapes[kind][name]))
            else:
                segments.append(torch.empty(len(places), 0))  # calls of this kind do without it
        columns[name] = SegmentedRows(segments) if len(segments) > 1 else segments[0]
    return columns


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


Columns = dict[str, Tensor | DiskTensor | SegmentedRows]


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
