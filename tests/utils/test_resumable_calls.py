"""The calls that a killed run has made are answered from its file, and change nothing else."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fp4dit.calibration.capture import CaptureTask, PromptBatch
from fp4dit.evaluation.generate import GenerateTask
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.utils import save_timer
from fp4dit.utils.resumable_calls import resume_calls
from tests.helpers import tiny
from tests.rounding.test_reconstruction import Killed


class Model(nn.Module):
    """A model that counts its calls, and whose outputs are of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        self.count += 1
        y = (scale * x).T  # its strides are not those of a new tensor
        outputs = [
            y,
            (y, None),
            Transformer2DModelOutput(sample=y),
            {"y": y.bfloat16(), "n": 3},
        ]
        return outputs[int(scale) % 4]


def describe(output: Any) -> Any:
    """Return an output with the bits, shapes and strides of its tensors."""
    if isinstance(output, Tensor):
        return output.dtype, output.stride(), output.tolist()
    if isinstance(output, tuple):
        return tuple(map(describe, output))
    if isinstance(output, dict):
        return type(output), {name: describe(value) for name, value in output.items()}
    return output


def run(model: Model, path: Path, count: int) -> list[Any]:
    with resume_calls(model, path, "cpu", seconds=0.0):
        return [describe(model(torch.randn(2, 3, generator=seeded(i)), i)) for i in range(count)]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_answers_equal_outputs_of_every_kind(tmp_path: Path):
    model, hooked = Model(), []
    model.register_forward_hook(lambda _module, _args, output: hooked.append(describe(output)))
    first = run(model, tmp_path / "calls", 6)
    assert model.count == 6
    assert run(model, tmp_path / "calls", 8)[:6] == first
    assert model.count == 8  # only the last two were computed
    assert hooked[6:12] == first
    assert "forward" not in vars(model)


def test_the_signature_of_the_module_is_kept(tmp_path: Path):
    model = Model()
    signature = inspect.signature(model.forward)
    with resume_calls(model, tmp_path / "calls", "cpu"):
        assert inspect.signature(model.forward) == signature


@pytest.mark.parametrize("kind", [CaptureTask, GenerateTask])
def test_a_killed_batch_continues_at_the_call(
    pipeline: PixArtAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
):
    """The sampler is killed at its third call of four, and the files have the same bytes."""
    monkeypatch.setattr(save_timer, "process_age", lambda: 0.0)
    monkeypatch.setattr(save_timer, "SHORTEST", 0.0)
    monkeypatch.setattr(save_timer, "SAVES_PER_INTERVAL", 0.0)
    block = pipeline.transformer.transformer_blocks[0]
    batch = PromptBatch(0, tiny.PROMPTS[:2], [5, 6])

    def make_files(name: str) -> dict[str, bytes]:
        (tmp_path / name).mkdir(exist_ok=True)
        kind(pipeline, tmp_path / name, 4, 4.5).predict_step(batch)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    expected, calls = make_files("whole"), []

    def die_at_third(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed

    hook = block.register_forward_pre_hook(die_at_third)
    with pytest.raises(Killed):
        make_files("killed")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["00000.resume"]
    assert make_files("killed") == expected
    assert len(calls) == 3 + 2  # two calls were not made again
    hook.remove()
