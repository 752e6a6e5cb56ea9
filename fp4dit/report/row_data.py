"""Data of a row that a report shows beside its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4dit.tables.rows import ScoredRow


@dataclass(frozen=True)
class StageStatus:
    """A stage of a row's run.

    Attributes:
        name: Name of the stage.
        key: Key of its result.
        state: Words that say whether its result is in the store.
    """

    name: str
    key: str
    state: str


@dataclass(frozen=True)
class RowData:
    """Everything that a report shows of a row. What the store does not have is None or empty.

    Attributes:
        scored: Row of the seed whose images are shown.
        command: Command that makes the row.
        config: Resolved config of its stages, as YAML.
        stages: Its stages.
        fill_command: Command that makes the missing results; "" if none is missing.
        problem: Reason why the run cannot be planned yet.
        images: Folder with `images.json` and `images/*.png`.
        reference: Folder of the full-precision images, with the same files.
        sqnr: Lines with layer, timestep and sqnr_db.
        curve: Lines with unit, step and error; of a training run the error is the loss.
        blocks: Objects with unit and error.
        histograms: Content of histograms.json.
    """

    scored: ScoredRow
    command: str
    config: str = ""
    stages: Sequence[StageStatus] = ()
    fill_command: str = ""
    problem: str = ""
    images: Path | None = None
    reference: Path | None = None
    sqnr: Sequence[Mapping[str, str]] = ()
    curve: Sequence[Mapping[str, str]] = ()
    blocks: Sequence[Mapping[str, Any]] = ()
    histograms: Mapping[str, Any] | None = field(default=None)
