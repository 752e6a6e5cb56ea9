"""What a unit is fitted to: the inputs that the quantized model gives it, and the answers of the original one."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fp4dit.calls import Call, removed
from fp4dit.columns import Room
from fp4dit.layer import QuantLayer
from fp4dit.stream import Columns, State, Unit, on, rows

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """What a unit's call is made of in the quantized model, and its answer in the original."""

    rows: State
    target: tuple[Tensor, ...]

    def to(self, device: torch.device | str) -> "Example":  # Lightning moves anything that has `.to`
        return Example(on(device, self.rows), tuple(t.to(device, non_blocking=True) for t in self.target))

    def pinned(self) -> "Example":
        """In memory that a GPU copies from while it computes."""
        rows = {name: value.pin_memory() for name, value in self.rows.items()}
        return Example(rows, tuple(t.pin_memory() for t in self.target))


@dataclass(frozen=True)
class Examples:
    """What a unit is given in the quantized model, what it answers in the original, and the rows to learn from. What a
    fit keeps of all rows takes its place in `room`."""

    unit: Unit
    inputs: Columns
    targets: Columns
    trained: Int[Tensor, "n"]
    room: Room = field(default_factory=Room)

    def at(self, index: Int[Tensor, "b"]) -> Example:
        target = rows(self.targets, index)
        return Example(self.unit.rows(self.inputs, index), tuple(target[name] for name in self.unit.answer))

    def call(self, index: Int[Tensor, "b"], device: torch.device | str) -> Call:
        return self.unit.call(on(device, self.unit.rows(self.inputs, index)))


@dataclass
class Batches(IterableDataset[Example]):
    """Endless batches, each row once per epoch in an order that depends on the seed alone; all but the first `skip`.

    Rows that lie in files, or are on their way to a GPU, are read while the batch before them is worked on.
    """

    examples: Examples
    batch: int
    seed: int
    skip: int = 0

    def __iter__(self) -> Iterator[Example]:
        columns = [*self.examples.inputs.values(), *self.examples.targets.values()]
        if torch.cuda.is_available():
            return ahead(example.pinned() for example in self.batches())
        return self.batches() if all(isinstance(column, Tensor) for column in columns) else ahead(self.batches())

    def batches(self) -> Iterator[Example]:
        generator, trained = torch.Generator().manual_seed(self.seed), self.examples.trained
        left = trained[:0]
        for number in count():
            while len(left) < self.batch:
                left = torch.cat([left, trained[torch.randperm(len(trained), generator=generator)]])
            index, left = left[: self.batch], left[self.batch :]
            if number >= self.skip:
                yield self.examples.at(index)


def witness(layers: Sequence[QuantLayer], examples: Examples, batch: int, seed: int = 0) -> list[float]:
    """How large the weights are that will be fitted, and the first batch that they will be fitted to."""
    first = next(Batches(examples, batch, seed).batches())
    tensors = [*(layer.rows for layer in layers), *first.rows.values(), *first.target]
    return [tensor.detach().float().norm().item() for tensor in tensors]


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same endless items, each made while the one before it is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items)
        while True:
            item = coming.result()
            coming = pool.submit(next, items)
            yield item


@torch.no_grad()
def inputs(
    module: nn.Module, layers: Sequence[QuantLayer], examples: Examples, index: Int[Tensor, "n"], batch: int
) -> Iterator[list[Float[Tensor, "b t k"] | None]]:
    """What each layer's product reads while `module` answers the given rows; None for a layer that is not asked."""
    seen: list[Tensor | None] = [None] * len(layers)

    def hook(i: int, x: Tensor) -> None:
        seen[i] = x.reshape(len(x), -1, x.shape[-1])

    def by_row(x: Tensor | None, count: int) -> Tensor | None:
        """Together what a layer reads several vectors of for each row. One of a range reads of fewer rows."""
        return x if x is None or len(x) % count else x.reshape(count, -1, x.shape[-1])

    hooks = [
        layer.activation.register_forward_hook(lambda _m, _given, x, i=i: hook(i, x))  # pyright: ignore[reportArgumentType]
        for i, layer in enumerate(layers)
    ]
    with removed(hooks):
        for part in index.split(batch):
            seen[:] = [None] * len(layers)
            examples.call(part, layers[0].weight.device)(module)
            yield [by_row(x, len(part)) for x in seen]
