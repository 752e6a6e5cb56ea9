"""Data of a unit: its inputs in the quantized model and its outputs in the original one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import IterableDataset

from fp4dit.calibration.token_sample import TokenSample
from fp4dit.data.columns import MemoryBudget
from fp4dit.data.segments import find_stops, split_index
from fp4dit.models.blocks import (
    ActivationState,
    RowSources,
    Unit,
    select_rows,
    to_device,
)
from fp4dit.utils.calls import Call

T = TypeVar("T")


@dataclass(frozen=True)
class UnitBatch:
    """Some rows of the data of a unit.

    Attributes:
        rows: The inputs of the unit in the quantized model, by name, with one row per sample.
        target: The outputs of the unit in the original model, with the same rows.

    Example:
        >>> batch = UnitBatch({"hidden": torch.zeros(8, 16, 64)}, (torch.zeros(8, 16, 64),))
        >>> batch.to("cpu").rows["hidden"].shape
        torch.Size([8, 16, 64])
    """

    rows: ActivationState
    target: tuple[Tensor, ...]

    def to(self, device: torch.device | str) -> "UnitBatch":
        """Copy the batch to a device. Lightning calls this method."""
        target = tuple(value.to(device, non_blocking=True) for value in self.target)
        return UnitBatch(to_device(device, self.rows), target)

    def pin_memory(self) -> "UnitBatch":
        """Copy the batch to pinned memory, from which a GPU copies while it computes."""
        rows = {name: value.pin_memory() for name, value in self.rows.items()}
        return UnitBatch(rows, tuple(value.pin_memory() for value in self.target))


@dataclass(frozen=True)
class UnitDataset:
    """The calibration data of one unit.

    Args:
        unit: The unit.
        inputs: The activations that the quantized model gives the unit, for all rows.
        targets: The outputs of the unit in the original model, for all rows.
        train_rows: The numbers of the rows to learn from.
        memory: The budget for data that a rounding method keeps for all rows.
        tokens: The sample of tokens for what is fitted to tokens; None for all tokens.

    Example:
        >>> dataset = UnitDataset(unit, {"x": x}, {"y": linear(x)}, torch.arange(128))
        >>> batch = dataset.select(torch.tensor([3, 7]))
    """

    unit: Unit
    inputs: RowSources
    targets: RowSources
    train_rows: Int[Tensor, "n"]
    memory: MemoryBudget = field(default_factory=MemoryBudget)
    tokens: TokenSample | None = None

    def select(self, index: Int[Tensor, "b"]) -> UnitBatch:
        """Return the rows with the numbers in `index`."""
        target = select_rows(self.targets, index)
        return UnitBatch(
            self.unit.select_inputs(self.inputs, index),
            tuple(target[name] for name in self.unit.outputs),
        )

    def make_call(self, index: Int[Tensor, "b"], device: torch.device | str) -> Call:
        """Return the unit's call for the given rows in the quantized model."""
        return self.unit.make_call(to_device(device, self.unit.select_inputs(self.inputs, index)))


@dataclass
class UnitBatches(IterableDataset[UnitBatch]):
    """Endless batches of a unit's training rows, with each row once per epoch.

    Rows of different shapes are in different batches.

    A thread reads the next batch while the current one is used, if rows lie in files or are copied
    to a GPU.

    Args:
        dataset: The unit's data.
        batch_size: The number of rows of a batch. A batch may span two epochs.
        seed: The seed of the order of the rows.
        num_skipped: The number of batches to skip at the beginning. Their rows are not read.

    Example:
        >>> batches = iter(UnitBatches(dataset, batch_size=16, seed=0))
        >>> batch = next(batches)
    """

    dataset: UnitDataset
    batch_size: int
    seed: int
    num_skipped: int = 0

    def __iter__(self) -> Iterator[UnitBatch]:
        batches = self.iter_batches()
        if torch.cuda.is_available():
            return prefetch(batch.pin_memory() for batch in batches)
        columns = [*self.dataset.inputs.values(), *self.dataset.targets.values()]
        in_memory = all(isinstance(column, Tensor) for column in columns)
        return batches if in_memory else prefetch(batches)

    def iter_batches(self) -> Iterator[UnitBatch]:
        """Yield the batches without a thread and without pinned memory."""
        generator = torch.Generator().manual_seed(self.seed)
        for number, index in enumerate(self.iter_indices(generator)):
            if number >= self.num_skipped:
                yield self.dataset.select(index)

    def iter_indices(self, generator: torch.Generator) -> Iterator[Int[Tensor, "b"]]:
        """Yield the rows of each batch. All rows of a batch are of one segment of the columns."""
        rows = self.dataset.train_rows
        remaining: dict[int, Tensor] = {}
        while True:
            epoch = rows[torch.randperm(len(rows), generator=generator)]
            for part in split_index(self.dataset.inputs, epoch):
                segment = int(torch.bucketize(part[0], self.stops, right=True))
                queue = torch.cat([remaining.get(segment, rows[:0]), part])
                while len(queue) >= self.batch_size:
                    yield queue[: self.batch_size]
                    queue = queue[self.batch_size :]
                remaining[segment] = queue

    @property
    def stops(self) -> Int[Tensor, "s"]:
        """The number of the row after each segment of the columns."""
        return torch.tensor(find_stops(self.dataset.inputs))


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an endless iterator, and compute each while the previous one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item = future.result()
            future = pool.submit(next, items)
            yield item
