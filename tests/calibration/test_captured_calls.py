"""Test files of captured calls: completeness, size and bit-exact content."""

from pathlib import Path

import pytest
import torch

from fp4dit.calibration import captured_calls
from fp4dit.calibration.captured_calls import CapturedSteps
from fp4dit.data.captured import open_captured_calls
from fp4dit.models.blocks import count_rows
from fp4dit.utils.files import checksum_path


def make_states(steps: int) -> list[dict[str, torch.Tensor]]:
    text, mask = torch.randn(4, 6, 8).half(), torch.zeros(4, 1, 6)
    states = []
    for step in range(steps):
        latent, timestep = torch.randn(4, 2, 3, 3), torch.full((4,), 999 - step)
        states.append({"latent": latent, "timestep": timestep, "text": text, "bias": mask.clone()})
    return states


def read_steps(folder: Path) -> list[dict[str, torch.Tensor]]:
    columns = open_captured_calls(folder)
    return list(CapturedSteps(columns, torch.arange(count_rows(columns))))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_saved_calls_are_loaded_bit_exactly(tmp_path: Path, steps: int):
    states, path = make_states(steps), tmp_path / "00000.safetensors"
    captured_calls.save_calls([states], path)
    loaded = read_steps(tmp_path)
    assert len(loaded) == steps
    for before, after in zip(states, loaded, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name], after[name])
    assert {file.name for file in tmp_path.iterdir()} == {path.name, checksum_path(path).name}


def test_constant_inputs_are_written_once(tmp_path: Path):
    captured_calls.save_calls([make_states(1)], tmp_path / "one.safetensors")
    captured_calls.save_calls([make_states(9)], tmp_path / "nine.safetensors")
    one = (tmp_path / "one.safetensors").stat().st_size
    nine = (tmp_path / "nine.safetensors").stat().st_size
    per_step = 4 * 2 * 3 * 3 * 4 + 4 * 8
    assert nine - one == pytest.approx(8 * per_step, abs=200)


def test_views_and_expanded_tensors_are_saved_by_value(tmp_path: Path):
    shared = torch.randn(6)
    states = [
        {"a": shared[:3], "b": shared[None].expand(3, 6), "c": torch.randn(2, 3).T}
        for _ in range(2)
    ]
    captured_calls.save_calls([states], tmp_path / "x.safetensors")
    assert all(torch.equal(states[1][name], read_steps(tmp_path)[1][name]) for name in "abc")


def test_a_killed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write_half(tensors: dict, path: Path, about: dict) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(captured_calls, "save_tensors", write_half)
    with pytest.raises(KeyboardInterrupt):
        captured_calls.save_calls([make_states(2)], tmp_path / "00000.safetensors")
    assert list(tmp_path.glob("*.safetensors")) == []
