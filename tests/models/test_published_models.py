"""Published models without weights: their quantized layers, and presets that fit them."""

from collections.abc import Sequence

import pytest
from accelerate import init_empty_weights
from torch import nn

from benchmarks.published import PUBLISHED, build_random_transformer, is_traced
from fp4dit.numerics.quantizer import PerHead, PerSplit, PerToken
from fp4dit.quantization import apply, audit, rules
from pipelines.config.resolvers import list_options
from pipelines.planning.plan import make_plan
from tests.configs.test_presets import check_run
from tests.conftest import Compose


def build_skeleton(model: str, **changed: int) -> nn.Module:
    with init_empty_weights():
        return build_random_transformer(model, **changed)


def plan_weight(composed: Compose, *overrides: str) -> Sequence[rules.Rule]:
    """Return the rules of the weights of a run."""
    return make_plan(composed(*overrides))["reconstruct"].instantiate_stage().weight


def test_every_published_model_is_here():
    others = {"shapes", "emoji", *filter(is_traced, list_options("model"))}
    assert set(PUBLISHED) == set(list_options("model")) - others


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("pixart_alpha", 291),
        ("pixart_alpha_512", 287),
        ("pixart_sigma", 287),
        ("hunyuan", 459),
        ("hunyuan_v1_2", 459),
        # Patches; modulation, attention and feed-forward of each block; output layers.
        ("dit_xl_2", 1 + 28 * (3 + 4 + 2) + 2),
    ],
)
def test_the_layers_that_are_quantized(composed: Compose, model: str, count: int):
    weight = plan_weight(composed, f"model={model}", "model_layers.sensitive=[]")
    entries = audit.audit_weights(build_skeleton(model), weight)
    quantized = [entry for entry in entries if entry.format != "fp16"]
    assert len(quantized) == count
    assert {entry.format for entry in quantized if entry.name.endswith("ff.net.0.proj")} == {"e3m0"}
    outside = {entry.name.split(".")[0] for entry in entries if entry.format == "fp16"}
    expected = (
        {"pos_embed", "time_extra_emb", "text_embedder", "norm_out", "proj_out"}
        if "hunyuan" in model
        else set()
    )
    assert outside == expected


def test_pixart_keeps_its_most_sensitive_layers_in_16_bits(composed: Compose):
    weight = plan_weight(composed, "model=pixart_sigma")
    entries = audit.audit_weights(build_skeleton("pixart_sigma"), weight)
    kept = [entry for entry in entries if entry.format == "fp16"]
    assert {entry.name for entry in kept} == {"pos_embed.proj", "proj_out"}
    assert sum(entry.values for entry in kept) < 0.0002 * sum(entry.values for entry in entries)


@pytest.mark.parametrize(
    "method", ["fp4dit", "gptq", "hq_dit", "ptq4dit", "q_dit", "q_diffusion", "vidit_q"]
)
def test_a_preset_fits_layers_of_published_width(composed: Compose, method: str):
    check_run(
        composed, build_skeleton("hunyuan", num_layers=4), "model=hunyuan", f"method={method}"
    )


@pytest.mark.parametrize(
    "activation", ["e3m4_token_halves", "e2m3_token_halves", "e3m4_token_before_norm"]
)
def test_halves_joined_by_a_long_skip_have_own_scales(composed: Compose, activation: str):
    """Block 3 of 4 concatenates its input with a long skip connection."""
    plan = make_plan(composed("model=hunyuan", f"activation={activation}"))
    stage = plan["activate"].instantiate_stage()
    model = build_skeleton("hunyuan", num_layers=4)
    assigned = rules.assign_rules(rules.find_layers(model), stage.weight)
    apply.quantize_weights_(model, assigned, check=False)
    quantizers, _ = apply.quantize_activations_(model, stage.activation)
    granularities = {name: type(q.quantizer.granularity) for name, q in quantizers.items()}
    split = [name for name, granularity in granularities.items() if granularity is PerSplit]
    assert split == ["blocks.3.skip_linear"]
    heads = {PerHead} if "before_norm" in activation else set()  # of q, k and v
    assert set(granularities.values()) == {PerToken, PerSplit} | heads
    norm = model.blocks[0].attn1.norm_q
    assert isinstance(norm, nn.Sequential) == ("before_norm" in activation)
