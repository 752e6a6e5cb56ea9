"""What a quantizer measured, kept: scales, a chosen format, and for each timestep if that matters."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.choice import Choice
from fp4dit.clock import Clock
from fp4dit.formats import Format
from fp4dit.quantizer import Quantizer
from fp4dit.rounding import Rounding, nearest
from fp4dit.scaling import Blocks, Scaling, from_parts, parts
from fp4dit.verbatim import Verbatim


class Grid(Verbatim):
    """A quantizer and what was measured for it: the scales, and the format where that was to be chosen.

    As a module it quantizes what flows through it: online, unless it is `static`; then as it was measured, and not at
    all before.
    """

    def __init__(self, quantizer: Quantizer, static: bool = False) -> None:
        super().__init__()
        self.quantizer, self.static = quantizer, static

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "..."], importance: Blocks | None = None) -> None:
        blocks = self.quantizer.granularity.split(x).float()
        if isinstance(self.quantizer.format, Choice):
            self.register_buffer("choice", self.quantizer.format.choose(blocks, self.quantizer.scale))
        self.hold(self.quantizer.scale(blocks, self.format, importance))

    def hold(self, scaling: Scaling) -> None:
        for name, value in parts(scaling).items():
            self.register_buffer(name, value)

    @property
    def format(self) -> Format:
        """Raises KeyError if it is to be chosen and nothing was measured yet."""
        given = self.quantizer.format
        return given.pick(self.held()["choice"]) if isinstance(given, Choice) else given

    @property
    def scaling(self) -> Scaling | None:
        found = {name: value for name, value in self.held().items() if name != "choice"}
        return from_parts(found) if found else None

    def held(self) -> dict[str, Tensor]:
        """What was measured, by name."""
        return dict(self.named_buffers())

    def forward(self, x: Float[Tensor, "..."], rounding: Rounding = nearest) -> Float[Tensor, "..."]:
        if self.scaling is None:
            return x if self.static else self.quantizer.settled(x)(x, rounding=rounding)
        chosen = isinstance(self.quantizer.format, Choice)  # else nothing is replaced, for torch.compile cannot follow
        quantizer = replace(self.quantizer, format=self.format) if chosen else self.quantizer
        return quantizer(x, self.scaling, rounding)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # What was measured is only known from what was saved.
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key.removeprefix(prefix), torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def formats(quantizer: Quantizer) -> list[Format]:
    """Those that it may turn out to have."""
    return list(quantizer.format.formats) if isinstance(quantizer.format, Choice) else [quantizer.format]


class TimedGrid(Grid):
    """A static grid with scales of its own for each timestep; between those measured, the nearest one's."""

    def __init__(self, quantizer: Quantizer, clock: Clock) -> None:
        super().__init__(quantizer, static=True)
        self.clock = clock

    def measure_at(self, values: Mapping[float, Tensor]) -> None:
        """Choose the scales of each timestep from its values."""
        found = []
        for x in values.values():
            one = Grid(self.quantizer)
            one.measure(x)
            found.append(one.held())
        for name, first in found[0].items():
            self.register_buffer(name, torch.stack([one[name] for one in found]))
            self.register_buffer("timesteps", torch.tensor(list(values), device=first.device))

    def held(self) -> dict[str, Tensor]:
        held = super().held()
        timesteps = held.pop("timesteps", None)
        if timesteps is None:
            return held
        index = (timesteps - self.clock.now[0]).abs().argmin()
        return {name: value[index] for name, value in held.items()}
