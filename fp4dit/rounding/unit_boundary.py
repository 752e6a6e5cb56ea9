"""Activations between two units, saved so that a killed reconstruction does not compute them again.

Without them a resumed reconstruction would propagate both models through all finished units first,
which may take longer than the time until it is killed again.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fp4dit.calibration.saved_rows import SavedRows, count_row_bytes
from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.data.segments import Columns, find_stops
from fp4dit.models.blocks import RowSources, count_rows
from fp4dit.utils.save_timer import LONGEST, SaveTimer


@dataclass(frozen=True)
class UnitBoundary:
    """Activations after a unit, in the original and in the quantized model.

    Args:
        number: The number of the unit, from 1; 0 for the inputs of the model.
        original: The activations of the original model that later units read.
        quantized: Those of the quantized model.

    Example:
        >>> boundary = UnitBoundary(0, columns, columns)
    """

    number: int
    original: RowSources
    quantized: RowSources

    def select_computed(self, captured: RowSources) -> dict[str, RowSource]:
        """Return the columns that are not those of the captured calls, by model and name."""
        columns = {}
        for side, state in (("original", self.original), ("quantized", self.quantized)):
            for name, column in state.items():
                if column is not captured.get(name):
                    columns[f"{side}/{name}"] = column
        return columns


class BoundaryFiles:
    """The latest activations between two units, in a folder.

    Args:
        folder: The folder, in a folder that exists.
        seconds: The longest time between two saves. See `SaveTimer`.

    Example:
        >>> files = BoundaryFiles(Path("units/boundary"))
        >>> boundary = files.load(columns, MemoryBudget(), last=3)
        >>> files.save_if_due(UnitBoundary(4, original, quantized), columns)
    """

    def __init__(self, folder: Path, seconds: float = LONGEST) -> None:
        self.folder, self.timer = folder, SaveTimer(seconds)

    def save_if_due(self, boundary: UnitBoundary, captured: RowSources) -> None:
        """Save a boundary, if that is due and the disk has room for it, in place of an earlier one.

        Args:
            boundary: The boundary.
            captured: The columns of the captured calls, which are not saved again.
        """
        columns = boundary.select_computed(captured)
        if columns and self.timer.is_due and self.has_room(columns):
            self.timer.save(lambda: self.write(boundary.number, columns), self.folder)

    def write(self, number: int, columns: RowSources) -> None:
        """Write the columns after a unit, and remove those after earlier units.

        Raises:
            OSError: if they cannot be written.
        """
        for path in self.folder.glob("*.incomplete"):  # of a killed process
            shutil.rmtree(path)
        part = self.folder / f"{number:03}.incomplete"
        SavedRows(part).write(columns, count_rows(columns))
        earlier = self.list_complete()
        part.rename(part.with_suffix(""))
        for path in earlier:
            shutil.rmtree(path)

    def has_room(self, columns: RowSources) -> bool:
        """Return whether the free space of the disk is at least twice the size of the columns."""
        size = count_row_bytes(columns) * count_rows(columns)
        return shutil.disk_usage(self.folder.parent).free >= 2 * size

    def list_complete(self) -> list[Path]:
        """Return the folders of complete boundaries, in order."""
        return [path for path in sorted(self.folder.glob("*")) if path.name.isdigit()]

    def load(self, captured: RowSources, memory: MemoryBudget, last: int) -> UnitBoundary:
        """Load the latest boundary after a unit up to `last`; that before all units if none is.

        Args:
            captured: The columns of the captured calls.
            memory: The budget for the activations.
            last: The number of units, from the first on, that are finished.
        """
        stops = find_stops(captured)
        for path in reversed(self.list_complete()):
            if int(path.name) <= last:
                columns, num_rows = SavedRows(path).load(stops, memory)
                if num_rows == stops[-1]:
                    sides = split_by_side(columns)
                    return UnitBoundary(
                        int(path.name),
                        {**captured, **sides["original"]},
                        {**captured, **sides["quantized"]},
                    )
            shutil.rmtree(path)
        return UnitBoundary(0, {**captured}, {**captured})

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def split_by_side(columns: Mapping[str, RowSource]) -> dict[str, Columns]:
    """Group columns called `original/NAME` and `quantized/NAME`."""
    sides: dict = {"original": {}, "quantized": {}}
    for full_name, column in columns.items():
        side, _, name = full_name.partition("/")
        sides[side][name] = column
    return sides
