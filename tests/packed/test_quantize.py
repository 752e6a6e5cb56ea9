"""Models that are quantized from their weights alone equal those that the stages make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn

from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import PerGroup, PerToken, Quantizer
from fp4dit.numerics.rounding import StochasticRounding
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.packed.export import pack_transformer_, quantize_to_nearest_
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.quantize import (
    assign_transformer_rules,
    quantize_and_pack_,
    with_packed_formats,
)
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.unit_files import load_quantized_
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import resolve_package_path
from fp4dit.utils.modules import copy_to_meta
from pipelines.planning.plan import make_plan
from tests.conftest import Compose
from tests.helpers import tiny
from tests.helpers.small_runs import run_stages
from tests.packed.test_diffusers import run_transformer
from tests.rounding.test_data_free import DATA_FREE

E2M1 = Quantizer(floating(2, 1), PerGroup(16), AbsMax(fp16))
TOKENS = [Rule("*", Quantizer(floating(3, 4), PerToken()))]
WEIGHT = tiny.rules_for(E2M1, per_channel_layers=["pos_embed.proj"])
CASES = [[f"method={method}"] for method in sorted(DATA_FREE)]
CASES += [
    ["method=nvfp4_rtn", "rounding=stochastic"],
    ["method=mxfp4_rtn", "transform=hadamard_16"],
    ["method=rtn_fp4", "model.dtype=bfloat16"],
]
FEW = [
    "calibration.num_prompts=2",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=3",
    "calibration.steps=1",
    "generation.steps=1",
    "prompts.count=1",
]


@pytest.fixture(scope="module")
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shipped model with the first of its blocks only."""
    pipe = PixArtSigmaPipeline.from_pretrained(
        resolve_package_path("pkg://fp4dit/worlds/shapes/weights")
    )
    config = {**pipe.transformer.config, "num_layers": 1}
    transformer = PixArtTransformer2DModel.from_config(config)
    state = pipe.transformer.state_dict()
    transformer.load_state_dict({name: state[name] for name in transformer.state_dict()})
    pipe.transformer = transformer
    folder = tmp_path_factory.mktemp("short")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all stages, of which all methods share the captured calls."""
    return tmp_path_factory.mktemp("outputs")


@torch.no_grad()
def run_shipped(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 8, 8, generator=generator).to(transformer.dtype)
    text = torch.randn(2, 5, 256, generator=generator).to(transformer.dtype)
    conditions = {"resolution": None, "aspect_ratio": None}
    timestep = torch.tensor([700, 20])
    return transformer(latent, text, timestep, added_cond_kwargs=conditions, return_dict=False)[0]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.unchecked
def test_equals_the_stages(composed: Compose, short_folder: Path, outputs: Path, case: list[str]):
    overrides = [
        "model=pixart_sigma",
        "model.dtype=float32",
        f"model.path={short_folder}",
        "model.tokens=20",
        "prompts=shapes",
        *FEW,
        *case,
    ]
    folders = run_stages(outputs, *overrides, small=FEW, targets=["activate"])
    stages = make_plan(composed(*overrides))
    reconstruct = stages["reconstruct"].instantiate_stage()
    weight, activation = reconstruct.weight, stages["activate"].instantiate_stage().activation
    pipeline = reconstruct.model.load()
    transformer = pipeline.transformer
    rules = assign_rules(find_layers(transformer), weight)
    results = folders["reconstruct"], folders["activate"]
    _, inputs = load_quantized_(pipeline, weight, activation, *results)
    pack_transformer_(transformer, rules, inputs)

    quantized = reconstruct.model.load().transformer
    before = run_shipped(quantized)
    quantize_to_nearest_(quantized, weight, activation, reconstruct.rounding.elementwise_rounding)
    assert_equal_states(quantized, transformer)
    config = quantized.config.quantization_config.to_dict()
    assert config == transformer.config.quantization_config.to_dict()
    assert run_shipped(quantized).equal(run_shipped(transformer))
    assert not run_shipped(quantized).equal(before)


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    state, other_state = one.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        assert value.dtype == other_state[name].dtype, name
        assert value.equal(other_state[name]), name


def load_tiny(pixart_folder: Path) -> Any:
    return PixArtTransformer2DModel.from_pretrained(pixart_folder / "transformer")


def test_a_layer_is_packed_before_the_next_one_is_touched(
    pixart_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Count the unpacked quantized layers whenever one is rounded."""
    import fp4dit.packed.quantize as module

    transformer, counts = load_tiny(pixart_folder), []

    def count_and_pack(model: nn.Module, name: str, layer: Any) -> PackedLinear:
        counts.append(sum(hasattr(part, "weight_fake_quant") for part in model.modules()))
        return original(model, name, layer)

    original = module.pack_layer_
    monkeypatch.setattr(module, "pack_layer_", count_and_pack)
    quantize_and_pack_(transformer, assign_transformer_rules(transformer, WEIGHT))
    assert counts == [1] * len(find_layers(load_tiny(pixart_folder)))


def test_timestep_ranges_without_transforms(pixart_folder: Path):
    transformer, plain = load_tiny(pixart_folder), load_tiny(pixart_folder)
    ranges = tiny.rules_for(E2M1, per_channel_layers=["pos_embed.proj"], timestep_boundaries=[500])
    quantize_to_nearest_(transformer, ranges, TOKENS)
    quantize_to_nearest_(plain, WEIGHT, TOKENS)
    assert len(transformer.transformer_blocks[0].attn1.to_q.ranges) == 2
    assert run_transformer(transformer).equal(run_transformer(plain))


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        ([Rule("*", None)], [], "no layer is quantized"),
        ([Rule("*.wq", E2M1), *WEIGHT], [], "no layer is left for the rule '\\*.wq'"),
        (tiny.rules_for(Quantizer(floating(2, 1), PerGroup(48))), [], "pos_embed.proj"),
        (WEIGHT, [Rule("*.x", None), *TOKENS], "no layer is left for the rule '\\*.x'"),
        (WEIGHT, [Rule("*", None)], "no activation is quantized"),
    ],
)
def test_refused_rules_change_nothing(
    pixart_folder: Path, weight: list[Rule], activation: list[Rule], message: str
):
    transformer = load_tiny(pixart_folder)
    with pytest.raises(UserError, match=message):
        quantize_to_nearest_(transformer, weight, activation)
    assert_equal_states(transformer, load_tiny(pixart_folder))
    assert type(transformer.proj_out) is nn.Linear
    assert "quantization_config" not in transformer.config


def test_a_rounding_that_no_format_allows(pixart_folder: Path):
    shared = tiny.rules_for(Quantizer(SharedMantissa(floating(2, 2), 4), PerGroup(16)))
    with pytest.raises(UserError, match=r"pos_embed\.proj \(rule '\*'\)"):
        quantize_to_nearest_(load_tiny(pixart_folder), shared, (), StochasticRounding())


def test_models_that_cannot_be_quantized(pixart_folder: Path):
    with pytest.raises(UserError, match="Sequential has no linear layers"):
        assign_transformer_rules(nn.Sequential(nn.ReLU()), WEIGHT)
    with pytest.raises(UserError, match=r"weight of pos_embed\.proj is not in memory"):
        quantize_to_nearest_(copy_to_meta(load_tiny(pixart_folder)), WEIGHT)  # pyright: ignore
    damaged = load_tiny(pixart_folder)
    damaged.proj_out.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="proj_out holds NaN"):
        quantize_to_nearest_(damaged, WEIGHT)


def test_a_copy_on_meta_shares_nothing(pixart_folder: Path):
    transformer = load_tiny(pixart_folder)
    copied = copy_to_meta(transformer)
    assert all(value.is_meta for value in copied.state_dict().values())
    assert all(buffer.is_meta for buffer in copied.buffers())
    for name, value in transformer.state_dict().items():
        assert copied.state_dict()[name].shape == value.shape
    copied.get_submodule("transformer_blocks").requires_grad_(True)
    assert_equal_states(transformer, load_tiny(pixart_folder))


def test_audit_names_the_formats_that_were_chosen(composed: Compose, pixart_folder: Path):
    """Powers of two have no error in E3M0; uniform weights have the least in E1M2."""
    overrides = ("weight=fp4_channel_least_error", "rounding=nearest", "activation=none")
    rules = make_plan(composed(*overrides))["reconstruct"].instantiate_stage().weight
    transformer, generator = load_tiny(pixart_folder), torch.Generator().manual_seed(0)
    exponents = torch.randint(-6, 1, transformer.proj_out.weight.shape, generator=generator)
    exponents[:, 0] = 0
    transformer.proj_out.weight.data = 2.0**exponents
    audit = quantize_to_nearest_(transformer, rules)
    formats = {row.name: row.format for row in audit}
    assert formats["proj_out"] == "e3m0"
    assert formats["transformer_blocks.0.attn1.to_q"] == "e1m2"
    assert with_packed_formats(transformer, audit) == audit


def test_rotations_need_no_inputs(pixart_folder: Path):
    rotated = tiny.rules_for(E2M1, per_channel_layers=["pos_embed.proj"], transforms=[Hadamard(16)])
    transformer, plain = load_tiny(pixart_folder), load_tiny(pixart_folder)
    quantize_to_nearest_(transformer, rotated)
    quantize_to_nearest_(plain, WEIGHT)
    exact = run_transformer(load_tiny(pixart_folder))
    errors = [
        (run_transformer(model) - exact).norm() / exact.norm() for model in (transformer, plain)
    ]
    assert all(0.01 < error < 0.3 for error in errors)
    assert not run_transformer(transformer).equal(run_transformer(plain))
