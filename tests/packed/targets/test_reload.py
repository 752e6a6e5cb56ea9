"""Stock diffusers loads exported folders in a process that never imports fp4dit."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import fp4dit
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import resolve_package_path
from tests.conftest import Run
from tests.packed.targets.test_sdnq import REASON

CALL = """
image = pipe("a large red circle on a white background", num_inference_steps=2,
    generator=torch.Generator().manual_seed(3), max_sequence_length=20, guidance_scale=4.5,
    use_resolution_binning=False, clean_caption=False, output_type="pt").images
"""

SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
{call}
assert "fp4dit" not in sys.modules
save_file({{"image": image.contiguous()}}, sys.argv[2])
"""


def run_stock(script: str, *arguments: str | Path) -> None:
    """Run a script in a process that does not import fp4dit."""
    environment = os.environ | {
        "SDNQ_USE_TORCH_COMPILE": "0",
        "PYTHONPATH": os.pathsep.join(
            path for path in sys.path if path and not Path(path, "fp4dit").is_dir()
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(str(arguments[0])).parent,
    )
    assert done.returncode == 0, done.stderr


def load_shipped() -> Any:
    folder = resolve_package_path("pkg://fp4dit/worlds/shapes/weights")
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def quantized() -> Any:
    """The shipped pipeline, in FP4DiT's formats with inputs that are not quantized."""
    pipe = load_shipped()
    fp4dit.quantize(pipe, "rtn_fp4", overrides=["activation=none"])
    return pipe


def draw_with_plain_weights(quantized: Any) -> torch.Tensor:
    """Draw with the original model, whose weights are replaced by the dequantized ones."""
    pipe = load_shipped()
    for name, layer in quantized.transformer.named_modules():
        if isinstance(layer, PackedLinear):
            weight = pipe.transformer.get_submodule(name).weight
            weight.data = layer.dequantize(torch.float32).view(weight.shape)
    scope: dict[str, Any] = {"pipe": pipe, "torch": torch}
    exec(CALL, scope)
    return scope["image"]


@pytest.mark.unchecked
def test_stock_diffusers_draws_the_same_image(quantized: Any, tmp_path: Path):
    if find_spec("sdnq") is None:
        pytest.skip(REASON)
    notes = fp4dit.export(quantized, tmp_path / "theirs", "sdnq")
    assert any("float4_e3m0fn in groups of 128" in note for note in notes)
    run_stock(SCRIPT.format(call=CALL), tmp_path / "theirs", tmp_path / "image.safetensors")
    image = load_file(tmp_path / "image.safetensors")["image"]
    assert image.equal(draw_with_plain_weights(quantized))


@pytest.mark.unchecked
def test_an_experiment_is_exported_for_another_library(run: Run, tmp_path: Path):
    few = ["calibration.num_prompts=2", "calibration.num_val_prompts=1", "prompts.count=2"]
    few += ["calibration.batch_size=1", "generation.steps=2", "progress=none", "method=rtn_fp4"]
    assert run(*few, "targets=[export]", "export_format=sdnq") == 0
    folder = next(tmp_path.glob("store/export/*/pipeline"))
    card = (folder / "README.md").read_text()
    assert "its readers leave them in 16 bits" in card
    assert "## Scores" in card
    assert "import fp4dit" not in card
    assert (folder / "model_index.json").is_file()
    assert not (folder.parent / "packed").exists()


def test_mistakes_are_refused(quantized: Any, tmp_path: Path):
    with pytest.raises(UserError, match="sdqn"):
        fp4dit.export(quantized, tmp_path / "new", "sdqn")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    with pytest.raises(UserError, match="it exists and is not empty"):
        fp4dit.export(quantized, tmp_path / "old", "sdnq")
    with pytest.raises(UserError, match="is quantized by None"):
        fp4dit.export(load_shipped(), tmp_path / "new", "sdnq")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
