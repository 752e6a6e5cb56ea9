"""What a report shows of a row beside its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4dit.rows import Row


@dataclass(frozen=True)
class Stage:
    """A stage of a row's run. `state` says in words whether its result is there."""

    name: str
    key: str
    state: str


@dataclass(frozen=True)
class Material:
    """`scored` is the row of one seed, whose images are shown. Folders are None, and the rest is empty, where the store
    has nothing; `fill` is then the command that makes it, and `problem` why that cannot be planned yet.

    `sqnr` has layer, timestep, sqnr_db; `curve` has unit, step, error, as the stages wrote them; of what
    is trained anew the error is the loss.
    """

    scored: Row
    command: str
    config: str = ""
    stages: Sequence[Stage] = ()
    fill: str = ""
    problem: str = ""
    images: Path | None = None
    reference: Path | None = None
    sqnr: Sequence[Mapping[str, str]] = ()
    curve: Sequence[Mapping[str, str]] = ()
    blocks: Sequence[Mapping[str, Any]] = ()
    histograms: Mapping[str, Any] | None = field(default=None)
