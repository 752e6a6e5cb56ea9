"""Rows of calibration data, one for each captured call: in memory, or in files if too large."""

import json
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from safetensors import safe_open
from torch import Tensor

RowIndex = slice | Int[Tensor, "n"]

# The place of a row in captured calls: the file, the step, and the number within the step.
RowLocation = tuple[Path, int, int]


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
                values = file.get_slice(self.name)
                # A constant input is written once for all steps.
                is_constant = len(values.get_shape()) == 1 + len(self.row_shape)
                for _, step, row in group:
                    yield values[row : row + 1][0] if is_constant else values[step, row]


def open_captured_calls(folder: Path) -> dict[str, CapturedTensor]:
    """Return every input of the captured calls, with one row per call, by file and step."""
    locations: list[RowLocation] = []
    row_shapes: dict[str, torch.Size] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            counts = set()
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                count, *row = shape if name in about["constant"] else shape[1:]
                row_shapes[name] = torch.Size(row)
                counts.add(count)
        [count] = counts  # all inputs have the same number of rows
        for step in range(about["steps"]):
            locations += [(path, step, row) for row in range(count)]
    return {name: CapturedTensor(name, locations, shape) for name, shape in row_shapes.items()}


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
        column, start = None, 0
        for part in parts:
            if column is None:
                column = self.allocate(torch.Size([count, *part.shape[1:]]), part.dtype)
            write_rows(column, start, part.cpu())
            start += len(part)
        if column is None or start == count:
            return column
        return RowSubset(column, torch.arange(start))

    def release(self, size: int) -> None:
        """Subtract the bytes of a deleted column from the memory in use."""
        self.used_bytes -= size

    def load(self, column: RowSource, batch_size: int = 64) -> RowSource:
        """Return the column in memory if the budget allows it; otherwise return it unchanged."""
        first = column[:1]
        if self.used_bytes + first.nbytes * len(column) > self.limit_bytes:
            return column
        loaded = self.allocate(column.shape, first.dtype)
        for start in range(0, len(column), batch_size):
            write_rows(loaded, start, column[start : start + batch_size])
        return loaded


def write_rows(column: Tensor | DiskTensor, start: int, rows: Shaped[Tensor, "n ..."]) -> None:
    """Write consecutive rows of a column, from row `start` on."""
    if isinstance(column, Tensor):
        column[start : start + len(rows)] = rows
    else:
        column.write(start, rows)
