"""Recorded calls: kept whole, written once, read back to the bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fp4dit import calls
from fp4dit.columns import captured
from fp4dit.reconstruction import Steps
from fp4dit.store import noted
from fp4dit.stream import count


def states(steps: int) -> list[dict[str, torch.Tensor]]:
    text, mask = torch.randn(4, 6, 8).half(), torch.zeros(4, 1, 6)
    return [
        {"latent": torch.randn(4, 2, 3, 3), "timestep": torch.full((4,), 999 - t), "text": text, "bias": mask.clone()}
        for t in range(steps)
    ]


def steps_in(folder: Path) -> list[dict[str, torch.Tensor]]:
    columns = captured(folder)
    return list(Steps(columns, torch.arange(count(columns))))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_what_is_saved_is_loaded(tmp_path: Path, steps: int):
    given, path = states(steps), tmp_path / "00000.safetensors"
    calls.save(given, path)
    loaded = steps_in(tmp_path)
    assert len(loaded) == steps
    for before, after in zip(given, loaded, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name], after[name])
    assert {file.name for file in tmp_path.iterdir()} == {path.name, noted(path).name}


def test_what_never_changes_is_written_once(tmp_path: Path):
    calls.save(states(1), tmp_path / "one.safetensors")
    calls.save(states(9), tmp_path / "nine.safetensors")
    one, nine = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("one", "nine"))
    per_step = 4 * 2 * 3 * 3 * 4 + 4 * 8
    assert nine - one == pytest.approx(8 * per_step, abs=200)


def test_views_and_expanded_tensors_are_saved_as_they_look(tmp_path: Path):
    shared = torch.randn(6)
    given = [{"a": shared[:3], "b": shared[None].expand(3, 6), "c": torch.randn(2, 3).T} for _ in range(2)]
    calls.save(given, tmp_path / "x.safetensors")
    assert all(torch.equal(given[1][name], steps_in(tmp_path)[1][name]) for name in "abc")


def test_a_killed_write_leaves_no_file_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(tensors: dict, path: Path, about: dict) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(calls, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        calls.save(states(2), tmp_path / "00000.safetensors")
    assert list(tmp_path.glob("*.safetensors")) == []


def test_listening_hears_calls_by_argument_and_then_stops():
    class Adder(nn.Module):
        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            return x + y

    module, x, y = Adder(), torch.randn(3), torch.randn(3)
    with calls.listen(module) as heard:
        module(x, y=y)
        module(y, y=x)
    module(x, y=y)
    assert [(c.args, c.kwargs) for c in heard] == [((x,), {"y": y}), ((y,), {"y": x})]
    assert torch.equal(heard[0](module), x + y)
