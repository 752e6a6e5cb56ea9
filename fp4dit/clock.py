"""The timestep that a model is at, for what depends on it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fp4dit.calls import Call
from fp4dit.stream import Rows, Unit


class Clock:
    """The timestep of each row of the batch at hand; of all rows, if there is one number."""

    def __init__(self) -> None:
        self.now = torch.zeros(1)

    def follow(self, model: nn.Module) -> None:
        """Reads the timestep of every call of `model`."""
        model.register_forward_pre_hook(self.hear, with_kwargs=True)

    def hear(self, model: nn.Module, args: tuple, kwargs: dict) -> None:  # by name: a process that is spawned knows it
        self.set(Call(args, kwargs).named(model)["timestep"])

    def set(self, timestep: Tensor) -> None:
        self.now = timestep.detach().flatten().float()

    def told(self, unit: Unit) -> Unit:
        """The unit, whose calls set this clock before they reach its module."""

        def call(s: Rows) -> Timed:
            made = unit.call(s)
            return Timed(made.args, made.kwargs, type(made), self, s["timestep"])

        return replace(unit, reads=(*unit.reads, "timestep"), call=call)


def tell(model: nn.Module, timestep: Tensor) -> None:
    """Sets the clocks that modules of `model` read, for calls of its parts."""
    for module in model.modules():
        clock = getattr(module, "clock", None)
        if isinstance(clock, Clock):
            clock.set(timestep)


@dataclass(frozen=True)
class Timed(Call):
    """A call of a part of the model, which is not told the time by its arguments. `kind` is what it is otherwise."""

    kind: type[Call]
    clock: Clock
    timestep: Tensor

    def __call__(self, module: nn.Module) -> Any:
        self.clock.set(self.timestep)
        return self.kind(self.args, self.kwargs)(module)
