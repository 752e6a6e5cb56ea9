"""Rows of activations that are saved while they are computed, so that a killed run reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.data.segments import Columns, add_rows, find_stops, iter_slices
from fp4dit.models.blocks import select_rows
from fp4dit.utils import pytree_io
from fp4dit.utils.resumable import load_checkpoint
from fp4dit.utils.save_timer import LONGEST, SaveTimer

FILE_BYTES = 1 << 27  # a file is held in memory while it is written or read


class SavedRows:
    """Columns of activations in a folder, which grows by the rows that are computed.

    Each file holds consecutive rows of all columns, and a checksum. A run that resumes reads the
    files up to the first that is missing or damaged.

    Args:
        folder: The folder. It must belong to one computation.
        seconds: The longest time between two saves. See `SaveTimer`.

    Attributes:
        num_saved: The number of rows that the folder holds.

    Example:
        >>> saved = SavedRows(Path("draft/targets"))
        >>> columns, first = saved.load(stops=(1280,), memory=MemoryBudget())
        >>> for start in range(first, 1280, 16):
        ...     compute_rows(columns, start, start + 16)
        ...     saved.save_if_due(columns, start + 16)
    """

    def __init__(self, folder: Path, seconds: float = LONGEST) -> None:
        self.folder, self.timer = folder, SaveTimer(seconds)
        self.num_saved = 0

    def load(self, stops: Sequence[int], memory: MemoryBudget) -> tuple[Columns, int]:
        """Return columns with the rows that were saved, and the number of these rows.

        Args:
            stops: The number of the row after each segment of the columns.
            memory: The budget for the columns.
        """
        columns: Columns = {}
        self.num_saved = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            content = load_checkpoint(path)
            if content is None or content["first"] != self.num_saved:
                path.unlink()  # its rows are computed again
                continue
            for name, rows in content["rows"].items():
                add_rows(columns, name, self.num_saved, rows, stops, memory)
            self.num_saved = content["stop"]
        return columns, self.num_saved

    def save_if_due(self, columns: Mapping[str, RowSource], stop: int) -> None:
        """Save the rows up to `stop` that are not saved yet, if that is due."""
        if self.timer.is_due:
            self.timer.save(lambda: self.write(columns, stop), self.folder)

    def write(self, columns: Mapping[str, RowSource], stop: int) -> None:
        """Write the rows up to `stop` that are not saved yet.

        Raises:
            OSError: if they cannot be written.
        """
        step = max(1, FILE_BYTES // max(1, count_row_bytes(columns)))
        stops = [min(end, stop) for end in find_stops(columns)]
        for rows in iter_slices(stops, self.num_saved, step):
            content: dict[str, Any] = {"first": rows.start, "stop": rows.stop}
            content["rows"] = select_rows(columns, rows)
            pytree_io.save_tree(content, self.folder / f"{rows.start:09}.safetensors")
            self.num_saved = rows.stop


def count_row_bytes(columns: Mapping[str, RowSource]) -> int:
    """Return the number of bytes of one row of all columns."""
    return sum(row.nbytes for row in select_rows(columns, slice(0, 1)).values())
