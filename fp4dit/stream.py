"""A model as a chain of units, and the tensors that flow between them.

To reconstruct unit k one needs its input in the quantized model and its answer in the original one. Both
models are advanced side by side, unit by unit, over all calibration calls: two passes in all, whatever the depth.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp4dit.calls import Call

State = dict[str, Tensor]  # every tensor has one row per calibration call


@dataclass(frozen=True)
class Unit:
    """A part of the model that is reconstructed as one.

    `call` reads the unit's arguments from the rows of a state; `answer` names the columns it leaves.
    `module` is the unit's name in the model.
    """

    module: str
    call: Callable[[Mapping[str, Tensor]], Call]
    answer: tuple[str, ...]


def answers(output: Tensor | tuple) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def rows(state: Mapping[str, Tensor], index: slice | Tensor) -> State:
    return {name: value[index] for name, value in state.items()}


def chunks(state: Mapping[str, Tensor], size: int) -> Iterator[State]:
    total = len(next(iter(state.values())))
    for start in range(0, total, size):
        yield rows(state, slice(start, start + size))


@torch.no_grad()
def advance(module: nn.Module, unit: Unit, state: Mapping[str, Tensor], size: int, device: torch.device | str) -> State:
    """The answers of `module` for every row, `size` rows at a time, on the CPU."""
    parts = []
    for part in chunks(state, size):
        call = unit.call({name: value.to(device) for name, value in part.items()})
        parts.append([answer.cpu() for answer in answers(call(module))])
    return {name: torch.cat(column) for name, column in zip(unit.answer, zip(*parts, strict=True), strict=True)}


def relative_error(answer: Mapping[str, Tensor], target: Mapping[str, Tensor], index: Tensor) -> float:
    """|answer - target|^2 / |target|^2 over the given rows, in fp64."""
    noise = signal = 0.0
    for name, value in target.items():
        wanted = value[index].double()
        noise += (answer[name][index].double() - wanted).square().sum().item()
        signal += wanted.square().sum().item()
    return noise / signal
