"""Stock diffusers loads exported folders in a process that never imports fp4dit."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import fp4dit
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.export import list_unpacked_tensors
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import resolve_package_path
from tests.conftest import Run
from tests.packed.targets.cases import CASES, Case

CALL = """
image = pipe("a large red circle on a white background", num_inference_steps=2,
    generator=torch.Generator().manual_seed(3), max_sequence_length=20, guidance_scale=4.5,
    use_resolution_binning=False, clean_caption=False, output_type="pt").images
"""

# Loads each folder by the code of its card, and runs what it loads.
SCRIPT = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    code = (folder / "theirs/README.md").read_text().split("```python")[1].split("```")[0]
    exec(code.replace("this/folder", str(folder / "theirs")))
    if (folder / "theirs/model_index.json").exists():
        {" ".join(CALL.split())}
    else:
        with torch.no_grad():
            inputs = load_file(folder / "inputs.safetensors")
            if "added_cond_kwargs" in transformer.forward.__code__.co_varnames:
                inputs["added_cond_kwargs"] = dict(resolution=None, aspect_ratio=None)
            image = transformer(**inputs, return_dict=False)[0]
    save_file({{"image": image.contiguous()}}, folder / "image.safetensors")
assert "fp4dit" not in sys.modules
"""

INPUTS = {
    PixArtTransformer2DModel: lambda: {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([700, 700]),
    },
    FluxTransformer2DModel: lambda: {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    },
}


def run_stock(folders: Sequence[Path]) -> None:
    """Load folders and run their models, in a process that does not import fp4dit."""
    paths = [path for path in sys.path if path and not Path(path, "fp4dit").is_dir()]
    environment = os.environ | {
        "SDNQ_USE_TORCH_COMPILE": "0",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=folders[0],
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


def use_dequantized_weights_(plain: nn.Module, packed: nn.Module) -> None:
    """Replace the weights of a plain model by those of a packed one, in place."""
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            weight = plain.get_submodule(name).weight
            weight.data = layer.dequantize(layer.dtype).view(weight.shape)


@torch.no_grad()
def save_case(case: Case, folder: Path) -> torch.Tensor:
    """Save a model and inputs in a folder, and return what the dequantized weights give."""
    packed = case.save(folder)
    plain = case.build().to(case.dtype).eval()
    plain.load_state_dict(list_unpacked_tensors(packed), strict=False)
    use_dequantized_weights_(plain, packed)
    plain.save_pretrained(folder / "plain")
    plain = type(plain).from_pretrained(folder / "plain", dtype=case.dtype)
    inputs = {}
    for name, value in INPUTS[type(plain)]().items():
        inputs[name] = value.to(case.dtype) if name != "timestep" else value
    save_file(inputs, folder / "inputs.safetensors")
    if isinstance(plain, PixArtTransformer2DModel):
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return plain(**inputs, return_dict=False)[0]


@pytest.mark.unchecked
def test_stock_diffusers_computes_the_same(quantized: Any, tmp_path: Path):
    """It loads by the code of the model card, without fp4dit, and computes the same to the bit."""
    expected = {}
    for name, case in CASES.items():
        if find_spec(case.package):
            (tmp_path / name).mkdir()
            expected[tmp_path / name] = save_case(case, tmp_path / name)
    if find_spec("sdnq"):  # images of the shipped pipeline
        notes = fp4dit.export(quantized, tmp_path / "images/theirs", "sdnq")
        assert any("float4_e3m0fn in groups of 128" in note for note in notes)
        pipe = load_shipped()
        use_dequantized_weights_(pipe.transformer, quantized.transformer)
        scope: dict[str, Any] = {"pipe": pipe, "torch": torch}
        exec(CALL, scope)
        expected[tmp_path / "images"] = scope["image"]
    run_stock(list(expected))
    for folder, image in expected.items():
        theirs = load_file(folder / "image.safetensors")["image"]
        if folder.name.startswith("auto_round"):  # it adds biases to products of 16 bits
            error = (theirs.float() - image.float()).norm() / image.float().norm()
            assert error < 0.01, (folder.name, error)
        else:
            assert theirs.equal(image), folder.name


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["export_format=gguf"], "from_single_file, which PixArtTransformer2DModel does not"),
        (["export_format=auto_round"], "pos_embed.proj: it is a convolution"),
        (["export_format=sdnq", "transform=hadamard"], "it rotates blocks of"),
        (["export_format=sdnq", "text_encoder=e2m1_g64"], "a packed text encoder cannot"),
        (["export_format=fp4dit"], "leave it out"),
    ],
)
def test_an_experiment_is_refused_before_it_starts(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
):
    assert run("method=fp4dit", "targets=[export]", "progress=none", *options) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("store/capture/*/manifest.json"))


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
