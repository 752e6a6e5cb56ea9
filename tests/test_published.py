"""The published models, without their weights: the layers that the paper counts, and presets that fit them."""

from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, ModelMixin, PixArtTransformer2DModel
from torch import nn

from fp4dit import policy
from pipelines.plan import plan
from pipelines.resolvers import options
from tests.conftest import Compose
from tests.test_presets import fits

# transformer/config.json of each on the hub
PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
}
HUNYUAN = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "text_len": 77,
    "text_len_t5": 256,
    "in_channels": 4,
    "learn_sigma": True,
    "mlp_ratio": 4.3637,
    "num_layers": 40,
    "patch_size": 2,
    "sample_size": 128,
}
DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 8, "num_layers": 28, "patch_size": 2}
PUBLISHED: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    "pixart_alpha": (PixArtTransformer2DModel, PIXART | {"sample_size": 128, "use_additional_conditions": True}),
    "pixart_alpha_512": (PixArtTransformer2DModel, PIXART | {"sample_size": 64}),
    "pixart_sigma": (PixArtTransformer2DModel, PIXART | {"sample_size": 128, "use_additional_conditions": False}),
    "pixart_sigma_512": (PixArtTransformer2DModel, PIXART | {"sample_size": 64, "use_additional_conditions": False}),
    "pixart_sigma_2k": (PixArtTransformer2DModel, PIXART | {"sample_size": 256, "use_additional_conditions": False}),
    "hunyuan": (HunyuanDiT2DModel, HUNYUAN),
    "hunyuan_v1_1": (HunyuanDiT2DModel, HUNYUAN),
    "hunyuan_v1_2": (HunyuanDiT2DModel, HUNYUAN | {"use_style_cond_and_image_meta_size": False}),
    "dit_xl_2": (DiTTransformer2DModel, DIT | {"sample_size": 32}),
    "dit_xl_2_512": (DiTTransformer2DModel, DIT | {"sample_size": 64}),
}


def skeleton(model: str, **changed: int) -> nn.Module:
    kind, config = PUBLISHED[model]
    with init_empty_weights():
        return kind(**config | changed)  # pyright: ignore[reportReturnType]


def test_every_published_model_is_here():
    assert set(PUBLISHED) == set(options("model")) - {"shapes", "generic"}


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("pixart_alpha", 291),
        ("pixart_alpha_512", 287),
        ("pixart_sigma", 287),
        ("hunyuan", 459),
        ("hunyuan_v1_2", 459),
        ("dit_xl_2", 1 + 28 * (3 + 4 + 2) + 2),  # patches; blocks' modulation, attention and feed-forward; output
    ],
)
def test_the_layers_that_are_quantized(composed: Compose, model: str, count: int):
    weight = plan(composed(f"model={model}"))["reconstruct"].make().weight
    entries = policy.check_weights(skeleton(model), weight)
    quantized = [entry for entry in entries if entry.format != "fp16"]
    assert len(quantized) == count
    assert {entry.format for entry in quantized if entry.name.endswith("ff.net.0.proj")} == {"e3m0"}
    outside = {entry.name.split(".")[0] for entry in entries if entry.format == "fp16"}
    expected = {"pos_embed", "time_extra_emb", "text_embedder", "norm_out", "proj_out"} if "hunyuan" in model else set()
    assert outside == expected


@pytest.mark.parametrize("method", ["fp4dit", "gptq", "hq_dit", "ptq4dit", "q_dit", "q_diffusion", "vidit_q"])
def test_a_preset_fits_layers_of_published_width(composed: Compose, method: str):
    fits(composed, skeleton("hunyuan", num_layers=4), "model=hunyuan", f"method={method}")


@pytest.mark.parametrize("activation", ["e3m4_token_halves", "e2m3_token_halves", "e3m4_token_before_norm"])
def test_the_halves_that_a_long_skip_joins_have_scales_of_their_own(composed: Compose, activation: str):
    stage = plan(composed("model=hunyuan", f"activation={activation}"))["activate"].make()
    dit = skeleton("hunyuan", num_layers=4)
    policy.quantize_weights_(dit, policy.assign(policy.layers(dit), stage.weight), check=False)
    grids, _ = policy.quantize_activations_(dit, stage.activation)
    kinds = {name: grid.quantizer.granularity.unit for name, grid in grids.items()}
    assert {name for name, unit in kinds.items() if unit == "part"} == {"blocks.3.skip_linear"}
    assert set(kinds.values()) == {"row", "part"}
    norm = dit.blocks[0].attn1.norm_q
    assert isinstance(norm, nn.Sequential) == ("before_norm" in activation)
