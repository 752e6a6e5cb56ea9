"""The published models, without their weights: the layers that the paper counts, and presets that fit them."""

import pytest
from accelerate import init_empty_weights
from torch import nn

from benchmarks.published import PUBLISHED, build
from fp4dit import policy
from pipelines.plan import plan
from pipelines.resolvers import options
from tests.conftest import Compose
from tests.test_presets import fits


def skeleton(model: str, **changed: int) -> nn.Module:
    with init_empty_weights():
        return build(model, **changed)


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
