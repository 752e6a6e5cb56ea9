"""A model as a chain of units, and the tensors that flow between them.

To reconstruct unit k one needs its input in the quantized model and its answer in the original one. Both
models are advanced side by side, unit by unit, over all calibration calls: two passes in all, whatever the depth.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fp4dit.calls import Call
from fp4dit.columns import Column, Index, OnDisk, Room, write
from fp4dit.health import not_finite

T = TypeVar("T")
State = dict[str, Tensor]  # rows of calibration calls, by what they are
Rows = Mapping[str, Tensor]  # the same, to be read
Columns = Mapping[str, Column]  # all rows, which may lie in files


@dataclass(frozen=True)
class Unit:
    """A part of the model that is reconstructed as one.

    `module` is the unit's name in the model. `call` makes its arguments of rows of the columns that `reads` names, as
    far as there are such; `answer` names the columns it leaves.
    """

    module: str
    reads: tuple[str, ...]
    call: Callable[[Rows], Call]
    answer: tuple[str, ...]

    def rows(self, columns: Columns, index: Index) -> State:
        return rows(needed(self.reads, columns), index)


def within(named: Mapping[str, T], unit: Unit) -> dict[str, T]:
    """What belongs to the layers inside a unit."""
    return {n: value for n, value in named.items() if n == unit.module or n.startswith(f"{unit.module}.")}


def needed(names: Collection[str], columns: Mapping[str, T]) -> dict[str, T]:
    return {name: column for name, column in columns.items() if name in names}


def answers(output: Any) -> tuple[Tensor, ...]:
    return tuple(value for value in tree_leaves(output) if isinstance(value, Tensor))


def rows(columns: Columns, index: Index) -> State:
    return {name: value[index] for name, value in columns.items()}


def on(device: torch.device | str, state: Rows) -> State:
    return {name: value.to(device, non_blocking=True) for name, value in state.items()}


def count(columns: Columns) -> int:
    return len(next(iter(columns.values())))


@torch.no_grad()
def advance(
    module: nn.Module,
    unit: Unit,
    columns: Columns,
    size: int,
    device: torch.device | str,
    room: Room | None = None,
    watch: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Column]:
    """The answers of `module` for every row, `size` rows at a time, on the CPU or in files. `watch` may show progress.

    Raises:
        UserError: if one is no number.
    """
    room, total = room or Room(), count(columns)
    made: dict[str, Tensor | OnDisk] = {}
    for start in watch(range(0, total, size)):
        index = slice(start, start + size)
        call = unit.call(on(device, unit.rows(columns, index)))
        for name, answer in zip(unit.answer, answers(call(module)), strict=True):
            bad = ~answer.isfinite().flatten(1).all(1)
            if bad.any():
                raise not_finite(unit.module, float(columns["timestep"][index][bad.cpu()][0]))
            if name not in made:
                made[name] = room.column(torch.Size([total, *answer.shape[1:]]), answer.dtype)
            write(made[name], start, answer.cpu())
    return {**made}


def relative_error(answer: Columns, target: Columns, index: Int[Tensor, "n"] | None = None, size: int = 64) -> float:
    """|answer - target|^2 / |target|^2 over the given rows, or all, in fp64."""
    index = torch.arange(count(target)) if index is None else index
    noise = signal = 0.0
    for name, value in target.items():
        for some in index.split(size):
            wanted = value[some].double()
            noise += (answer[name][some].double() - wanted).square().sum().item()
            signal += wanted.square().sum().item()
    return noise / signal
