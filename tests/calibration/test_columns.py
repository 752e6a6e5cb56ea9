"""Test that columns in files have the same content as columns in memory, and use no memory."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4dit.calibration import captured_calls
from fp4dit.data.captured import CapturedTensor, open_captured_calls
from fp4dit.data.columns import DiskTensor, MemoryBudget, RowSource, write_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def fill_column(memory: MemoryBudget, content: torch.Tensor, step: int = 3) -> RowSource:
    column = memory.allocate(content.shape, content.dtype)
    for start in range(0, len(content), step):
        write_rows(column, start, content[start : start + step])
    return column


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [0, 10**6], ids=["file", "memory"])
def test_written_rows_are_read(dtype: torch.dtype, limit: int):
    content = (torch.randn(10, 4, 5) * 9).to(dtype)
    column = fill_column(MemoryBudget(limit), content)
    assert isinstance(column, DiskTensor) == (limit == 0)
    assert isinstance(column, RowSource)
    assert (column.shape, len(column)) == (content.shape, 10)
    for index in (slice(None), slice(2, 5), slice(7, 99), torch.tensor([9, 0, 0, 3])):
        assert torch.equal(column[index], content[index])
    assert column[torch.tensor([1])].dtype == dtype


@pytest.mark.parametrize("limit", [0, 10**6], ids=["file", "memory"])
def test_a_gathered_column_has_only_the_rows_of_its_parts(limit: int):
    """A layer of one range of timesteps reads some of the calls only."""
    parts = [torch.ones(2, 3), torch.full((1, 3), 2.0)]
    column = MemoryBudget(limit).gather(5, iter(parts))
    assert column is not None
    assert len(column) == 3
    assert torch.equal(column[torch.arange(3)], torch.cat(parts))
    assert MemoryBudget(limit).gather(5, []) is None


def test_rows_of_a_file_are_copies():
    column = fill_column(MemoryBudget(0), torch.zeros(4, 2))
    for index in (slice(0, 2), torch.tensor([0, 1])):
        column[index].add_(1)
    assert not column[:].any()


def test_files_disappear_with_their_columns(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    columns = [fill_column(MemoryBudget(0, tmp_path), torch.ones(4, 2)) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    # The files have no names, so that a killed run leaves none.
    assert not list(tmp_path.iterdir())
    del columns
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12), st.integers(0, 100))
def test_columns_in_memory_stay_within_the_budget(allocations: list[tuple[int, bool]], limit: int):
    memory, alive = MemoryBudget(4.0 * limit), []
    for size, is_freed in allocations:
        alive.append(memory.allocate(torch.Size([size]), torch.float32))
        if is_freed:
            alive.pop(0)
        used_bytes = sum(column.nbytes for column in alive if isinstance(column, torch.Tensor))
        assert used_bytes == memory.used_bytes <= memory.limit_bytes


def test_captured_calls_are_read_from_their_files(tmp_path: Path):
    states: list[dict[str, torch.Tensor]] = []
    for number in range(2):
        text = torch.full((3, 4), number)
        steps = []
        for step in range(2):
            x, t = torch.randn(3, 2, 2), torch.full((3,), 10 - step)
            steps.append({"x": x, "text": text, "t": t})
        captured_calls.save_calls([steps], tmp_path / f"{number:05}.safetensors")
        states += steps
    columns = open_captured_calls(tmp_path)
    for name in ("x", "text", "t"):
        whole = torch.cat([state[name] for state in states])
        column = columns[name]
        assert isinstance(column, CapturedTensor)
        assert column.shape == whole.shape
        for index in (slice(None), slice(4, 9), torch.tensor([11, 0, 5, 5, 6])):
            assert torch.equal(column[index], whole[index])
            assert column[index].dtype == whole.dtype
        assert torch.equal(MemoryBudget().load(column, 5)[:], whole)
        assert MemoryBudget(whole.nbytes - 1).load(column) is column
