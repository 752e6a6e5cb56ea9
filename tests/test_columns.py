"""Columns in files answer as columns in memory, and take none."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4dit import calls
from fp4dit.columns import Captured, Column, OnDisk, Room, captured, write

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def filled(room: Room, content: torch.Tensor, step: int = 3) -> Column:
    column = room.column(content.shape, content.dtype)
    for start in range(0, len(content), step):
        write(column, start, content[start : start + step])
    return column


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [0, 10**6], ids=["file", "memory"])
def test_what_was_written_is_read(dtype: torch.dtype, limit: int):
    content = (torch.randn(10, 4, 5) * 9).to(dtype)
    column = filled(Room(limit), content)
    assert isinstance(column, OnDisk) == (limit == 0)
    assert isinstance(column, Column)
    assert (column.shape, len(column)) == (content.shape, 10)
    for index in (slice(None), slice(2, 5), slice(7, 99), torch.tensor([9, 0, 0, 3])):
        assert torch.equal(column[index], content[index])
    assert column[torch.tensor([1])].dtype == dtype


@pytest.mark.parametrize("limit", [0, 10**6], ids=["file", "memory"])
def test_what_is_gathered_has_no_row_that_nobody_gave(limit: int):
    """A layer of one range of timesteps sees some of the calls only."""
    parts = [torch.ones(2, 3), torch.full((1, 3), 2.0)]
    column = Room(limit).gather(5, iter(parts))
    assert column is not None
    assert len(column) == 3
    assert torch.equal(column[torch.arange(3)], torch.cat(parts))
    assert Room(limit).gather(5, []) is None


def test_what_was_read_is_no_view_of_the_file():
    column = filled(Room(0), torch.zeros(4, 2))
    for index in (slice(0, 2), torch.tensor([0, 1])):
        column[index].add_(1)
    assert not column[:].any()


def test_files_go_with_their_columns(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    columns = [filled(Room(0, tmp_path), torch.ones(4, 2)) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    assert not list(tmp_path.iterdir())  # they have no names, so that none is left behind a killed run
    del columns
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12), st.integers(0, 100))
def test_no_more_memory_is_in_use_than_there_is_room(wishes: list[tuple[int, bool]], limit: int):
    room, alive = Room(4.0 * limit), []
    for size, dies in wishes:
        alive.append(room.column(torch.Size([size]), torch.float32))
        if dies:
            alive.pop(0)
        held = sum(column.nbytes for column in alive if isinstance(column, torch.Tensor))
        assert held == room.used <= room.limit


def test_captured_calls_are_read_where_they_lie(tmp_path: Path):
    states = {
        f: [{"x": torch.randn(3, 2, 2), "text": torch.full((3, 4), f), "t": torch.full((3,), 10 - i)} for i in range(2)]
        for f in (0, 1)
    }
    for f, steps in states.items():
        steps[1]["text"] = steps[0]["text"]
        calls.save(steps, tmp_path / f"{f:05}.safetensors")
    columns = captured(tmp_path)
    for name in ("x", "text", "t"):
        whole = torch.cat([state[name] for steps in states.values() for state in steps])
        column = columns[name]
        assert isinstance(column, Captured)
        assert column.shape == whole.shape
        for index in (slice(None), slice(4, 9), torch.tensor([11, 0, 5, 5, 6])):
            assert torch.equal(column[index], whole[index])
            assert column[index].dtype == whole.dtype
        assert torch.equal(Room().load(column, 5)[:], whole)
        assert Room(whole.nbytes - 1).load(column) is column
