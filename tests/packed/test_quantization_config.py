"""Models that are quantized while diffusers and transformers load them."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import T5EncoderModel

from fp4dit.api.families import find_model_option
from fp4dit.api.presets import compose_preset
from fp4dit.api.quantization_config import QuantizationConfig
from fp4dit.api.quantize import quantize
from fp4dit.packed.export import find_largest_encoder, quantize_encoder_, quantize_to_nearest_
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import resolve_package_path
from tests.helpers import tiny
from tests.packed.test_quantize import assert_equal_states, run_shipped

pytestmark = pytest.mark.unchecked

METHOD = "nvfp4_4over6"
SHIPPED = resolve_package_path("pkg://fp4dit/worlds/shapes/weights")
BOTH = ("transformer", "text_encoder")
DRAW = """
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a large red circle",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=20,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    ).images
"""


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    """Run the code that other processes run, too."""
    namespace: dict[str, Any] = {"torch": torch}
    exec(DRAW, namespace)
    return namespace["draw"](pipe)


def map_config(config: QuantizationConfig, *names: str) -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config))  # pyright: ignore


@pytest.fixture(scope="module")
def configured() -> DiffusionPipeline:
    """The shipped pipeline, quantized while it was loaded."""
    config = map_config(QuantizationConfig(METHOD), *BOTH)
    return DiffusionPipeline.from_pretrained(SHIPPED, quantization_config=config)


@pytest.fixture(scope="module")
def saved(configured: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    configured.save_pretrained(folder)
    return folder


def test_a_pipeline_equals_that_of_quantize(configured: DiffusionPipeline):
    pipe = DiffusionPipeline.from_pretrained(SHIPPED)
    before = draw(pipe)
    quantize(pipe, METHOD, components=BOTH)
    for name in BOTH:
        assert_equal_states(configured.components[name], pipe.components[name])
        packed, expected = configured.components[name].config, pipe.components[name].config
        assert packed.quantization_config.to_dict() == expected.quantization_config.to_dict()
    assert draw(configured).equal(draw(pipe))
    assert not draw(configured).equal(before)


def test_a_saved_pipeline_loads_in_another_process(
    configured: DiffusionPipeline, saved: Path, tmp_path: Path
):
    code = f"""
import sys, torch, fp4dit
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
{DRAW}
pipe = DiffusionPipeline.from_pretrained({str(saved)!r})
save_file({{"image": draw(pipe)}}, {str(tmp_path / "image.safetensors")!r})
unwanted = "hydra", "omegaconf", "lightning", "wandb", "pipelines", "fp4dit.api"
print([name for name in unwanted if name in sys.modules])
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.stdout.splitlines()[-1:] == ["[]"], process.stderr
    assert "torchao" not in process.stderr
    assert load_file(tmp_path / "image.safetensors")["image"].equal(draw(configured))


def test_nothing_of_the_config_is_saved(saved: Path):
    for name in BOTH:
        config = json.loads((saved / name / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "fp4dit"
        assert config["quantization_config"].keys() == {
            "quant_method",
            "version",
            "weights",
            "inputs",
        }
    assert "on_load" not in "".join(path.read_text() for path in saved.rglob("*.json"))


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (AutoModel, {}),
        (PixArtTransformer2DModel, {"dtype": torch.bfloat16}),
        (PixArtTransformer2DModel, {"device_map": "cpu"}),
    ],
)
def test_a_transformer_alone(loader: Any, options: dict[str, Any], tmp_path: Path):
    config = QuantizationConfig("rtn", ["weight.format=e1m2"])
    where = {"subfolder": "transformer", **options}
    transformer = loader.from_pretrained(SHIPPED, quantization_config=config, **where)
    expected = loader.from_pretrained(SHIPPED, **where)
    preset = compose_preset("rtn", ["weight.format=e1m2"], "pixart_sigma")
    quantize_to_nearest_(expected, preset.weight, preset.activation)
    assert_equal_states(transformer, expected)
    assert transformer.dtype == options.get("dtype", torch.float32)
    assert "E1M2" in str(transformer.caption_projection).upper()
    assert run_shipped(transformer).equal(run_shipped(expected))
    transformer.save_pretrained(tmp_path)
    again = loader.from_pretrained(str(tmp_path), **options)
    assert_equal_states(again, transformer)
    assert run_shipped(again).equal(run_shipped(transformer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_text_encoder_alone(dtype: torch.dtype, tmp_path: Path):
    """In fp16, T5 keeps some layers in fp32, which are then quantized from fp32."""
    config = QuantizationConfig("nvfp4_rtn", ["text_encoder=nvfp4"])
    where = {"subfolder": "text_encoder", "dtype": dtype}
    encoder = T5EncoderModel.from_pretrained(SHIPPED, quantization_config=config, **where)
    expected = T5EncoderModel.from_pretrained(SHIPPED, **where)
    wo_dtype = expected.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype
    assert wo_dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    quantize_encoder_(expected, compose_preset("rtn", ["text_encoder=nvfp4"]).text_encoder)
    assert_equal_states(encoder, expected)
    assert encoder.encoder.block[0].layer[1].DenseReluDense.wo.dtype == wo_dtype
    assert encoder.encoder.block[0].layer[0].SelfAttention.q.dtype == dtype
    ids = torch.tensor([[1, 5, 3, 8]])
    hidden = expected(ids).last_hidden_state
    assert encoder(ids).last_hidden_state.equal(hidden)
    encoder.save_pretrained(tmp_path)
    again = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    assert_equal_states(again, encoder)
    assert again(ids).last_hidden_state.equal(hidden)


@pytest.mark.parametrize(
    "save",
    [tiny.save_alpha, tiny.save_hunyuan, tiny.save_dit, tiny.save_sd3, tiny.save_flux],
)
def test_every_architecture(save: Callable[[Path], None], tmp_path: Path):
    """Text encoders are T5, BERT and CLIP."""
    save(tmp_path / "plain")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    names = [name for name in plain.components if name.startswith(("text_encoder", "transformer"))]
    names = [name for name in names if plain.components[name] is not None]
    overrides = ["text_encoder.granularity=channel"]
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "plain",
        quantization_config=map_config(QuantizationConfig("rtn", overrides), *names),
    )
    quantize(plain, "rtn", overrides=overrides, components=names)
    pipe.save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    for name in names:
        assert any(isinstance(part, PackedLinear) for part in pipe.components[name].modules())
        assert_equal_states(pipe.components[name], plain.components[name])
        assert_equal_states(pipe.components[name], again.components[name])


def test_gemma(tmp_path: Path):
    tiny.save_sana(tmp_path)
    config = QuantizationConfig("rtn", ["text_encoder.granularity=channel"])
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path, quantization_config=map_config(config, "text_encoder"), dtype=torch.bfloat16
    )
    plain = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    name, encoder = find_largest_encoder(plain)
    quantize_encoder_(encoder, compose_preset("rtn", config.overrides).text_encoder)
    assert_equal_states(pipe.components[name], encoder)


def make_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=16,
    )


@torch.no_grad()
def run_wan(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 1, 4, 4, generator=generator).to(torch.bfloat16)
    text = torch.randn(1, 3, 32, generator=generator).to(torch.bfloat16)
    return transformer(latent, torch.tensor([500]), text, return_dict=False)[0]


def test_modules_that_stay_in_fp32(tmp_path: Path):
    """diffusers keeps some modules of Wan in fp32, among them layers that are quantized."""
    make_wan().save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    load = WanTransformer3DModel.from_pretrained
    expected = load(tmp_path / "plain", dtype=torch.bfloat16)
    assert expected.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    overrides = ["model_layers.sensitive=[]"]
    preset = compose_preset("rtn", overrides, find_model_option("WanTransformer3DModel"))
    quantize_to_nearest_(expected, preset.weight, preset.activation)
    config = QuantizationConfig("rtn", overrides)
    transformer = load(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config)
    transformer.save_pretrained(tmp_path / "packed")
    for model in (transformer, load(tmp_path / "packed", dtype=torch.bfloat16)):
        assert_equal_states(model, expected)
        assert model.condition_embedder.time_embedder.linear_1.dtype == torch.float32
        assert model.blocks[0].attn1.to_q.dtype == torch.bfloat16
        assert run_wan(model).equal(run_wan(expected))


def test_device_maps(pixart_folder: Path):
    config = QuantizationConfig("rtn", ["text_encoder.granularity=channel"])
    for load, name in ((AutoModel, "transformer"), (T5EncoderModel, "text_encoder")):
        options = {"subfolder": name, "quantization_config": config}
        expected = load.from_pretrained(str(pixart_folder), **options)
        for device_map in ({"": "cpu"}, "auto"):
            mapped = load.from_pretrained(str(pixart_folder), device_map=device_map, **options)
            assert_equal_states(mapped, expected)
        for device_map in ({"": "disk"}, {"": "cpu", "proj_out": "disk"}):
            with pytest.raises(UserError, match="cannot be quantized while it is loaded to"):
                load.from_pretrained(str(pixart_folder), device_map=device_map, **options)


def test_backend_of_a_pipeline_config(pixart_folder: Path):
    """The other form of diffusers' config gives the same as a mapping."""
    config = PipelineQuantizationConfig(
        quant_backend="fp4dit_on_load",
        quant_kwargs={"method": "rtn"},
        components_to_quantize=["transformer"],
    )
    pipe = DiffusionPipeline.from_pretrained(pixart_folder, quantization_config=config)
    mapped = DiffusionPipeline.from_pretrained(
        pixart_folder, quantization_config=map_config(QuantizationConfig("rtn"), "transformer")
    )
    assert isinstance(pipe.transformer.caption_projection.linear_1, PackedLinear)
    assert_equal_states(pipe.transformer, mapped.transformer)
    assert not any(isinstance(part, PackedLinear) for part in pipe.text_encoder.modules())


def test_a_config_is_json():
    config = QuantizationConfig("rtn", ["weight.format=e1m2"])
    assert repr(config) == "QuantizationConfig('rtn', ['weight.format=e1m2'])"
    assert repr(QuantizationConfig("rtn")) == "QuantizationConfig('rtn')"
    for again in (
        copy.deepcopy(config),
        QuantizationConfig.from_dict(json.loads(config.to_json_string())),
        QuantizationConfig.from_dict(config.to_dict()),
    ):
        assert again.to_dict() == config.to_dict()
        assert again.to_dict() == {
            "quant_method": "fp4dit_on_load",
            "method": "rtn",
            "overrides": ["weight.format=e1m2"],
        }


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("nvfp4_4over7", [], "did you mean nvfp4_4over6"),
        ("fp4dit", [], r"LearnedRounding, which reads .*fp4dit\.quantize\(pipe, 'fp4dit', prompts"),
        ("rtn_int4", [], "static scales, which are calibrated"),
        ("smoothquant", [], "Smoothing is fitted"),
        ("fp4dit_ft", ["rounding=nearest"], "its stage finetune trains"),
        ("fp16", [], "fp16 does not quantize"),
        ("rtn", ["weight.format=e99"], "e99"),
        ("rtn", ["weight.colour=red"], "colour"),
        ("rtn", "weight.format=e1m2", "give a list"),
    ],
)
def test_refused_when_made(method: str, overrides: Any, message: str):
    with pytest.raises(UserError, match=message):
        QuantizationConfig(method, overrides)


def break_weights(folder: Path) -> None:
    """Make the weights unreadable, so that an error about anything else comes before them."""
    for path in folder.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        data[8 : 8 + size] = re.sub(rb"\d", b"9", bytes(data[8 : 8 + size]))
        path.write_bytes(data)


def test_refused_before_weights_are_read(tmp_path: Path):
    tiny.save(tmp_path)
    config = QuantizationConfig("rtn", ["+weight.layers={other: {match: '*.wq', format: e1m2}}"])
    with pytest.raises(UserError, match=r"no layer is left for the rule '\*\.wq'"):
        AutoModel.from_pretrained(
            str(tmp_path), subfolder="transformer", quantization_config=config
        )
    config = QuantizationConfig("nvfp4_rtn")  # groups of 64 do not divide rows of 32
    break_weights(tmp_path / "text_encoder")
    with pytest.raises(UserError, match="SelfAttention"):
        T5EncoderModel.from_pretrained(
            tmp_path, subfolder="text_encoder", quantization_config=config
        )


class WithoutLayers(AutoencoderKL):
    """Model of diffusers without a linear layer or convolution."""

    def __init__(self, **_: Any) -> None:
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.ones(3))


def test_a_model_without_layers(tmp_path: Path):
    assert not find_layers(WithoutLayers())
    WithoutLayers().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="WithoutLayers has no linear layers"):
        WithoutLayers.from_pretrained(tmp_path, quantization_config=QuantizationConfig("rtn"))


def test_packed_models_are_not_quantized_again(saved: Path):
    """Both libraries notice; diffusers warns and keeps the packed model as it is."""
    config = QuantizationConfig("rtn")
    with pytest.raises(ValueError, match="is quantized with TransformersPackedConfig"):
        T5EncoderModel.from_pretrained(saved / "text_encoder", quantization_config=config)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModel.from_pretrained(str(saved / "transformer"), quantization_config=config)
    assert again.config.quantization_config.to_dict()["quant_method"] == "fp4dit"


def test_the_skeleton_comes_before_the_weights(pixart_folder: Path):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        AutoModel.from_pretrained(
            str(pixart_folder),
            subfolder="transformer",
            low_cpu_mem_usage=False,
            quantization_config=QuantizationConfig("rtn"),
        )
