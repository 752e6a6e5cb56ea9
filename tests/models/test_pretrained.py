"""Sources of pretrained pipelines: wrong folders are refused before a weight is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from fp4dit.models.pixart import PixArt
from fp4dit.utils.errors import UserError
from tests.helpers import tiny


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "pkg://fp4dit/nowhere"])
def test_a_missing_folder_is_refused(path: str):
    for attempt in (PixArt(path).build_on_meta, PixArt(path).load):
        with pytest.raises(UserError, match=f"there is no folder {path}"):
            attempt()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no model_index.json"),
        (
            {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]},
            "holds a StableDiffusionPipeline",
        ),
        (
            {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
            "holds a FluxPipeline",
        ),
    ],
)
def test_a_folder_of_another_pipeline_is_refused(tmp_path: Path, index: dict | None, message: str):
    if index:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    for attempt in (PixArt(str(tmp_path)).build_on_meta, PixArt(str(tmp_path)).load):
        with pytest.raises(UserError, match=message):
            attempt()


@pytest.mark.parametrize(
    ("quantization", "suffix"), [({"quant_method": "torchao"}, " of torchao"), ({"bits": 4}, "")]
)
def test_a_quantized_model_is_refused(
    pixart_folder: Path, tmp_path: Path, quantization: dict, suffix: str
):
    shutil.copytree(pixart_folder, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    source = PixArt(str(tmp_path / "model"))
    message = rf"{tmp_path}/model is quantized already .*has a quantization_config{suffix}\)"
    for attempt in (source.build_on_meta, lambda: source.check(["a"])):
        with pytest.raises(UserError, match=message):
            attempt()


def test_float16_moves_to_the_cpu_without_a_warning(
    pixart_folder: Path, caplog: pytest.LogCaptureFixture
):
    """The `to` of diffusers' pipeline warns, and the adapter's does not."""
    pipeline = PixArt(str(pixart_folder), "float16", tokens=20).load()
    pipeline.pipe.to("cpu")
    assert "cannot run with `cpu`" in caplog.text
    caplog.clear()
    pipeline.to("cpu")
    assert caplog.text == ""


def test_a_base_completes_a_transformer_alone(tmp_path: Path):
    pipeline, alone = tmp_path / "pipeline", tmp_path / "alone"
    tiny.save(pipeline)
    alone.mkdir()
    (pipeline / "transformer").rename(alone / "transformer")
    source = PixArt(str(alone), tokens=20, base=str(pipeline))
    images = source.load().sample(tiny.PROMPTS[:1], [0], 2, 4.5)
    assert images.shape == (1, 3, 16, 16)
    assert sum(1 for _ in source.build_on_meta().transformer.parameters()) > 0
    with pytest.raises(UserError, match="has no model_index"):
        PixArt(str(alone), tokens=20).load()


def test_folders_of_old_versions_of_diffusers_load(tmp_path: Path):
    """PixArt and DiT on the hub were saved when one transformer class served all models."""
    tiny.save(tmp_path)
    for name in ("model_index.json", "transformer/config.json"):
        text = (tmp_path / name).read_text()
        text = text.replace("PixArtTransformer2DModel", "Transformer2DModel")
        (tmp_path / name).write_text(text)
    source = PixArt(str(tmp_path), tokens=20)
    skeleton = dict(source.build_on_meta().transformer.named_parameters())
    assert dict(source.load().transformer.named_parameters()).keys() == skeleton.keys()
