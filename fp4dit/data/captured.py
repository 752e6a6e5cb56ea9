"""Columns of captured calls, which are read from the files of `captured_calls.save_calls`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import safe_open
from torch import Tensor

from fp4dit.data.columns import RowIndex, RowSource, SegmentedRows

# The place of a row in captured calls: the file, the group of calls in it, the step, and the number
# within the step.
RowLocation = tuple[Path, str, int, int]

# A column of captured calls that says of which kind the call of each row is. Rows of one kind have
# equal shapes.
CALL_KIND = "call_kind"


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
