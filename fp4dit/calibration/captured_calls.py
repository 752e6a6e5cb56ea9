"""Files of captured calls, which are written by step, and read by row or by step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from fp4dit.data.captured import CALL_KIND, open_captured_calls
from fp4dit.data.columns import MemoryBudget, RowSource, SegmentedRows
from fp4dit.models.blocks import ActivationState, RowSources, select_rows
from fp4dit.utils.files import atomic_write_checksummed
from fp4dit.utils.pytree_io import unshare_memory
from fp4dit.utils.safetensors_io import save_tensors


class CapturedSteps(Dataset[ActivationState]):
    """Captured calls, step by step: an item holds the rows of one call of the model.

    Args:
        columns: The captured calls.
        index: The numbers of the rows to use.

    Example:
        >>> steps = CapturedSteps(open_captured_calls(folder), torch.arange(16))
        >>> steps[0]["timestep"]
        tensor([999, 999])
    """

    def __init__(self, columns: Mapping[str, RowSource], index: Int[Tensor, "n"]) -> None:
        first = columns.get(CALL_KIND, next(iter(columns.values())))
        segments: Sequence[Any] = first.segments if isinstance(first, SegmentedRows) else [first]
        locations = [location for segment in segments for location in segment.locations]
        by_step: dict[tuple, list[int]] = {}
        for i in index.tolist():
            by_step.setdefault(locations[i][:-1], []).append(i)
        self.columns, self.steps = columns, [torch.tensor(rows) for rows in by_step.values()]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> ActivationState:
        return select_rows(self.columns, self.steps[index])


def save_calls(groups: Sequence[Sequence[Mapping[str, Tensor]]], path: Path) -> None:
    """Write the model's inputs at consecutive denoising steps to one file.

    A tensor that is the same at every step, such as the text, is written once.
    `fp4dit.data.columns.open_captured_calls` reads the file.

    Args:
        groups: The inputs at each step, for each group of rows whose shapes are equal.
        path: The file.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for number, states in enumerate(groups):
        prefix = f"{number}/" if len(groups) > 1 else ""
        constant = []
        for name in states[0]:
            values = [state[name] for state in states]
            if all(torch.equal(value, values[0]) for value in values):
                constant.append(name)
                tensors[prefix + name] = values[0]
            else:
                tensors[prefix + name] = torch.stack(values)
        about[prefix] = {"steps": len(states), "constant": constant}
    about = {"groups": about} if len(groups) > 1 else about[""]
    # The metadata is one entry, because safetensors writes several entries in an arbitrary order.
    with atomic_write_checksummed(path) as part:
        save_tensors(unshare_memory(tensors), part, {"about": json.dumps(about)})


def load_calls(folder: Path, memory: MemoryBudget | None = None) -> dict[str, RowSource]:
    """Return the columns of captured calls, with their rows in the order of files and steps.

    Columns that exceed the memory budget stay in their files. The column `prompt` holds the number
    of each row's prompt.
    """
    memory = memory or MemoryBudget()
    return {name: memory.load(column) for name, column in open_captured_calls(folder).items()}


def load_steps(folder: Path, num_prompts: int) -> tuple[CapturedSteps, CapturedSteps]:
    """Return the captured steps of the first `num_prompts` prompts, and of the other prompts."""
    columns = open_captured_calls(folder)
    train_rows, val_rows = split_rows(columns, num_prompts)
    return CapturedSteps(columns, train_rows), CapturedSteps(columns, val_rows)


def split_rows(columns: RowSources, num_prompts: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"]]:
    """Return the rows of the first `num_prompts` prompts, and of the other prompts."""
    is_train = columns["prompt"][:] < num_prompts
    return is_train.nonzero().flatten(), (~is_train).nonzero().flatten()
