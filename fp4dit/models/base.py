"""What this project needs of a text-to-image model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calls import Call
from fp4dit.stream import State, Unit


@runtime_checkable
class Pipeline(Protocol):
    """A pipeline whose transformer `dit` can be run whole (`sample`) and unit by unit (`begin`, `units`)."""

    dit: nn.Module
    device: torch.device
    options: Mapping[str, Any]  # what diffusers' pipeline is called with to draw, beside prompts, steps and guidance

    def to(self, device: torch.device | str) -> None: ...
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1]. Each prompt's noise comes from its own seed alone."""
        ...

    def subjects(self, prompts: Sequence[str]) -> Sequence[str | int]:
        """What diffusers' pipeline is given for them."""
        ...

    def blank(self, n: int) -> Call:
        """A call of `dit` for n samples as `sample` makes it, on the meta device and so without content."""
        ...

    def begin(self, call: Call) -> State:
        """The tensors of one call of `dit`, a row for each of its samples."""
        ...

    def units(self) -> list[Unit]:
        """All of `dit` that can be quantized, in execution order."""
        ...

    def save(self, folder: Path, base: str) -> None:
        """As a folder that diffusers loads, which says that it was made from `base`."""
        ...


@runtime_checkable
class Source(Protocol):
    """Where a pipeline is: light, so that a plan can hold it."""

    def load(self) -> Pipeline: ...
    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError if it is known before loading that one of them cannot be drawn, or that the transformer is
        quantized already."""
        ...

    def check_text_encoder(self) -> None:
        """Raises UserError if it is known before loading that there is no text encoder to be quantized."""
        ...

    def skeleton(self) -> Pipeline:
        """The transformer on the meta device: all but `to` and `sample`."""
        ...
