"""Rows that were saved are read, not computed again, and damaged ones are computed again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp4dit.calibration import saved_rows
from fp4dit.calibration.propagate import propagate_unit
from fp4dit.calibration.saved_rows import SavedRows
from fp4dit.data.columns import DiskTensor, MemoryBudget
from fp4dit.models.pixart import PixArtAdapter
from tests.calibration.test_propagate import make_call
from tests.helpers import tiny
from tests.rounding.test_reconstruction import Killed

MEMORIES = [MemoryBudget(), MemoryBudget(0)]


def make_columns(total: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(total, 3, 2, generator=generator),
        "half": torch.randn(total, 4, generator=generator).bfloat16(),
        "timestep": torch.arange(total),
    }


@pytest.mark.parametrize("memory", MEMORIES, ids=["memory", "files"])
def test_rows_that_were_saved_bit_by_bit_are_loaded(
    tmp_path: Path, memory: MemoryBudget, monkeypatch: pytest.MonkeyPatch
):
    columns, row_bytes = make_columns(), 3 * 2 * 4 + 4 * 2 + 8
    monkeypatch.setattr(saved_rows, "FILE_BYTES", 2 * row_bytes)
    saved = SavedRows(tmp_path, seconds=0.0)
    for stop in (3, 3, 8):
        saved.save_if_due(columns, stop)
    assert len(list(tmp_path.iterdir())) == 2 + 3  # of at most two rows each
    loaded, count = SavedRows(tmp_path).load((10,), memory)
    assert count == 8
    assert loaded.keys() == columns.keys()
    for name, column in columns.items():
        assert isinstance(loaded[name], DiskTensor) == (memory.limit_bytes == 0)
        assert loaded[name].shape == column.shape
        assert torch.equal(loaded[name][:8], column[:8])


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", None])
def test_rows_after_a_damaged_file_are_computed_again(tmp_path: Path, damage):
    saved = SavedRows(tmp_path, seconds=0.0)
    for stop in (2, 5, 9):
        saved.write(make_columns(), stop)
    _, second, _ = sorted(tmp_path.iterdir())
    if damage is None:
        second.unlink()
    else:
        second.write_bytes(damage(second.read_bytes()))
    saved = SavedRows(tmp_path, seconds=0.0)
    columns, count = saved.load((10,), MemoryBudget())
    assert count == 2
    for name, column in make_columns().items():
        columns[name][2:] = column[2:]
    saved.write(columns, 10)
    again, count = SavedRows(tmp_path).load((10,), MemoryBudget())
    assert count == 10
    assert all(torch.equal(again[name], column) for name, column in make_columns().items())


def test_a_folder_without_rows_is_empty(tmp_path: Path):
    assert SavedRows(tmp_path / "none").load((10,), MemoryBudget()) == ({}, 0)


@torch.no_grad()
def test_a_killed_propagation_computes_only_the_other_rows(pipeline: PixArtAdapter, tmp_path: Path):
    state, unit = pipeline.initial_state(make_call()), pipeline.units()[0]
    module = pipeline.transformer.pos_embed
    expected = propagate_unit(module, unit, state, 2, "cpu")
    batch_sizes = tiny.count(module)

    def die_at_third(batches: range):
        for number, start in enumerate(batches):
            if number == 2:
                raise Killed
            yield start

    with pytest.raises(Killed):
        propagate_unit(
            module, unit, state, 2, "cpu", progress=die_at_third, saved=SavedRows(tmp_path, 0.0)
        )
    assert batch_sizes == [2, 2]
    for _ in range(2):
        resumed = propagate_unit(module, unit, state, 2, "cpu", saved=SavedRows(tmp_path, 0.0))
        assert batch_sizes == [2, 2, 1]
        assert all(torch.equal(resumed[name], column) for name, column in expected.items())
