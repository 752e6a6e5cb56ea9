"""Columns of a state: one row for each calibration call, in memory, or in files where they would not fit."""

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

Index = slice | Int[Tensor, "n"]
Place = tuple[Path, int, int]  # of a row in captured calls: its file, step, and number within the step


@runtime_checkable
class Column(Protocol):
    """What is needed of a column; a tensor is one. What is read is in memory."""

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Index, /) -> Shaped[Tensor, "n ..."]: ...


class OnDisk:
    """Rows in a file without a name, which is gone with the object, or the process. What is read is copied, so that
    memory holds no page of the file."""

    def __init__(self, folder: Path | None, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # as long as this is
        self.file.truncate(shape.numel() * dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, start: int, rows: Shaped[Tensor, "n ..."]) -> None:
        self.file.seek(start * rows[0].nbytes)
        left = rows.contiguous().flatten().view(torch.uint8).numpy().data
        while left:  # not NumPy's tofile, whose error does not say that the disk is full
            left = left[self.file.write(left) :]

    def __getitem__(self, index: Index) -> Shaped[Tensor, "n ..."]:
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        rows = torch.frombuffer(mapped, dtype=self.dtype).view(self.shape)
        return rows[index].clone() if isinstance(index, slice) else rows[index]


@dataclass(frozen=True)
class Some:
    """The rows of a column that `index` names, read when they are asked for."""

    column: Column
    index: Int[Tensor, "n"]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.column.shape[1:]])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Index) -> Shaped[Tensor, "n ..."]:
        return self.column[self.index[index]]


@dataclass(frozen=True)
class Captured:
    """A column of recorded calls, left in the files that `fp4dit.calls.save` wrote."""

    name: str
    places: Sequence[Place]
    row: torch.Size

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *self.row])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Index) -> Shaped[Tensor, "n ..."]:
        wanted = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return torch.stack(list(self.read([self.places[i] for i in wanted])))

    def read(self, places: Sequence[Place]) -> Iterator[Tensor]:
        for path, here in groupby(places, lambda place: place[0]):
            with safe_open(path, "pt") as file:
                found = file.get_slice(self.name)
                constant = len(found.get_shape()) == 1 + len(self.row)  # written once for all steps
                for _, step, row in here:
                    yield found[row : row + 1][0] if constant else found[step, row]


def captured(folder: Path) -> dict[str, Captured]:
    """Every captured call as a row, by file and step."""
    places: list[Place] = []
    shapes: dict[str, torch.Size] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        each = {name: shape if name in about["constant"] else shape[1:] for name, shape in found.items()}
        shapes |= {name: torch.Size(row) for name, (_, *row) in each.items()}
        [count] = {rows for rows, *_ in each.values()}
        places += [(path, step, row) for step in range(about["steps"]) for row in range(count)]
    return {name: Captured(name, places, row) for name, row in shapes.items()}


@dataclass
class Room:
    """Memory for columns: `limit` bytes of it; what exceeds them lies in files on the disk of `folder`."""

    limit: int | float = float("inf")
    folder: Path | None = None
    used: int = 0

    def column(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | OnDisk:
        """A column without content, to be filled with `write`."""
        size = shape.numel() * dtype.itemsize
        if self.used + size > self.limit:
            return OnDisk(self.folder, shape, dtype)
        self.used += size
        column = torch.empty(shape, dtype=dtype)
        weakref.finalize(column, self.give_back, size)
        return column

    def gather(self, count: int, parts: Iterable[Shaped[Tensor, "n ..."]]) -> Column | None:
        """A column of at most `count` rows out of parts of them, from any device; None if there is no part."""
        made, start = None, 0
        for part in parts:
            made = self.column(torch.Size([count, *part.shape[1:]]), part.dtype) if made is None else made
            write(made, start, part.cpu())
            start += len(part)
        return made if made is None or start == count else Some(made, torch.arange(start))

    def give_back(self, size: int) -> None:
        self.used -= size

    def load(self, column: Column, size: int = 64) -> Column:
        """The column in memory, if there is room; else as it is."""
        first = column[:1]
        if self.used + first.nbytes * len(column) > self.limit:
            return column
        loaded = self.column(column.shape, first.dtype)
        for start in range(0, len(column), size):
            write(loaded, start, column[start : start + size])
        return loaded


def write(column: Tensor | OnDisk, start: int, rows: Shaped[Tensor, "n ..."]) -> None:
    if isinstance(column, Tensor):
        column[start : start + len(rows)] = rows
    else:
        column.write(start, rows)
