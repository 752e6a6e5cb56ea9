"""What is no PixArt is refused before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from fp4dit.errors import UserError
from fp4dit.models.pixart import PixArt, PixArtPipeline


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "pkg://fp4dit/nowhere"])
def test_a_path_that_leads_nowhere(path: str):
    for attempt in (PixArt(path).skeleton, PixArt(path).load):
        with pytest.raises(UserError, match=f"there is no folder {path}"):
            attempt()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no model_index.json"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}, "holds a StableDiffusionPipeline"),
        (
            {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
            "holds a FluxPipeline",
        ),
    ],
)
def test_a_folder_that_is_no_pixart(tmp_path: Path, index: dict | None, message: str):
    if index:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    for attempt in (PixArt(str(tmp_path)).skeleton, PixArt(str(tmp_path)).load):
        with pytest.raises(UserError, match=message):
            attempt()


@pytest.mark.parametrize(("quantized", "by"), [({"quant_method": "torchao"}, " of torchao"), ({"bits": 4}, "")])
def test_what_is_quantized_already_is_refused(pixart_folder: Path, tmp_path: Path, quantized: dict, by: str):
    shutil.copytree(pixart_folder, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantized}))
    source = PixArt(str(tmp_path / "model"))
    for attempt in (source.skeleton, lambda: source.check(["a"])):
        with pytest.raises(
            UserError, match=rf"{tmp_path}/model is quantized already .*has a quantization_config{by}\)"
        ):
            attempt()


def test_float16_goes_to_the_cpu_without_a_warning(pixart_folder: Path, caplog: pytest.LogCaptureFixture):
    """Of diffusers' own `to`, which warns, as is seen first."""
    pipeline = PixArt(str(pixart_folder), "float16", tokens=20).load()
    pipeline.pipe.to("cpu")
    assert "cannot run with `cpu`" in caplog.text
    caplog.clear()
    pipeline.to("cpu")
    assert caplog.text == ""


def test_skeleton_has_the_models_layers_and_no_memory(source: PixArt, pipeline: PixArtPipeline):
    skeleton = {name: p.shape for name, p in source.skeleton().dit.named_parameters()}
    assert skeleton == {name: p.shape for name, p in pipeline.dit.named_parameters()}
    assert all(p.is_meta for p in source.skeleton().dit.parameters())
