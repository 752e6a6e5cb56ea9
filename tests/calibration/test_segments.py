"""Rows of several shapes: columns, batches, files, and the random batches of a unit."""

from pathlib import Path

import torch

from fp4dit.calibration import captured_calls
from fp4dit.calibration.dataset import UnitBatches, UnitDataset
from fp4dit.calibration.saved_rows import SavedRows
from fp4dit.data.captured import open_captured_calls
from fp4dit.data.columns import MemoryBudget, SegmentedRows
from fp4dit.data.segments import Columns, add_rows, find_stops, iter_batches, iter_slices
from fp4dit.models.blocks import make_simple_unit

LENGTHS = (5, 7, 5)  # tokens of the rows of each segment
COUNTS = (6, 3, 4)


def make_columns() -> dict[str, SegmentedRows]:
    tokens, first = [], 0
    for length, count in zip(LENGTHS, COUNTS, strict=True):
        numbers = torch.arange(first, first + count)
        tokens.append(numbers[:, None].expand(count, length).float())
        first += count
    numbers = [part[:, 0] for part in tokens]
    return {"x": SegmentedRows(tokens), "timestep": SegmentedRows(numbers)}


def test_rows_of_segments_are_read_by_their_numbers():
    columns = make_columns()
    assert find_stops(columns) == (6, 9, 13)
    assert torch.equal(columns["timestep"][:], torch.arange(13.0))
    for index in (torch.tensor([12, 0, 7, 7, 3]), slice(4, 11)):
        expected = torch.arange(13.0)[index]
        assert torch.equal(columns["timestep"][index], expected)
    assert columns["x"][torch.tensor([8, 6])].tolist() == [[8.0] * 7, [6.0] * 7]
    assert torch.equal(columns["x"][torch.tensor([10, 2])][:, 0], torch.tensor([10.0, 2.0]))


def test_batches_hold_rows_of_one_segment():
    columns = make_columns()
    index = torch.tensor([12, 1, 7, 0, 8, 9, 2])
    batches = [batch.tolist() for batch in iter_batches(columns, index, 2)]
    assert batches == [[1, 0], [2], [7, 8], [12, 9]]
    slices = [(rows.start, rows.stop) for rows in iter_slices((6, 9, 13), 4, 4)]
    assert slices == [(4, 6), (6, 9), (9, 13)]


def test_random_batches_hold_rows_of_one_shape_and_all_rows_equally_often():
    columns = make_columns()
    unit = make_simple_unit("", ("x",), ("y",))
    dataset = UnitDataset(unit, columns, {"y": columns["x"]}, torch.arange(13))
    batches = UnitBatches(dataset, 4, seed=0).iter_batches()
    counts = torch.zeros(13)
    for _ in range(13 * 8):  # 32 epochs
        batch = next(batches)
        assert len(batch.rows["x"]) == 4
        assert torch.equal(batch.rows["x"], batch.target[0])
        counts += torch.bincount(batch.rows["x"][:, 0].long(), minlength=13)
    assert (counts - 32).abs().max() <= 4  # what waits for a full batch


def test_rows_of_segments_survive_a_kill(tmp_path: Path):
    columns, stops = make_columns(), (6, 9, 13)
    written: Columns = {}
    saved = SavedRows(tmp_path, 0.0)
    for rows in iter_slices(stops, 0, 4):
        add_rows(written, "x", rows.start, columns["x"][rows], stops, MemoryBudget())
        if rows.stop <= 10:
            saved.write(written, rows.stop)
    loaded, count = SavedRows(tmp_path).load(stops, MemoryBudget())
    assert count == 9
    for rows in iter_slices(stops, 0, 3):
        assert torch.equal(written["x"][rows], columns["x"][rows])
        if rows.stop <= count:
            assert torch.equal(loaded["x"][rows], columns["x"][rows])


def test_captured_groups_are_sorted_by_their_kind(tmp_path: Path):
    """Two files, each with calls of two kinds, of which one has an input that the other lacks."""
    for number in range(2):
        groups = []
        for kind, length in ((70, 3), (50, 4)):
            text = torch.full((2, length), 10.0 * number + kind)
            state = {"text": text, "call_kind": torch.full((2,), kind)}
            if kind == 50:
                state["mask"] = torch.ones(2, length)
            steps = [state | {"timestep": torch.full((2,), step)} for step in (9, 8)]
            groups.append(steps)
        captured_calls.save_calls(groups, tmp_path / f"{number:05}.safetensors")
    columns = open_captured_calls(tmp_path)
    assert find_stops(columns) == (8, 16)
    assert columns["call_kind"][:].tolist() == [70] * 8 + [50] * 8
    assert columns["timestep"][:].tolist() == [9, 9, 8, 8] * 4
    assert columns["text"][slice(4, 8)].tolist() == [[80.0] * 3] * 4
    assert columns["mask"][slice(8, 16)].shape == (8, 4)
    steps = list(captured_calls.CapturedSteps(columns, torch.arange(16)))
    assert [len(step["text"]) for step in steps] == [2] * 8
