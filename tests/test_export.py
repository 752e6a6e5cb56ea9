"""Every preset packs into the bits that its table counts, loads again, and answers as it did; the export stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

from fp4dit import policy
from fp4dit.packed.card import Facts, card
from fp4dit.packed.export import pack_transformer_, size
from fp4dit.packed.layer import PackedLinear
from fp4dit.reconstruction import Reconstruction
from pipelines.plan import plan
from pipelines.resolvers import options
from tests.conftest import Compose, Run

METHODS = sorted(set(options("method")) - {"fp16"})
SMALL = ["calibration.trained=2", "calibration.held_out=1", "calibration.chunk=1", "prompts.count=2", "generation.steps=2"]


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped transformer with one of its six blocks."""
    from fp4dit.resources import locate

    whole = PixArtTransformer2DModel.from_pretrained(locate("pkg://fp4dit.models.shapes/weights"), subfolder="transformer")
    less = PixArtTransformer2DModel.from_config({**whole.config, "num_layers": 1})
    less.load_state_dict(whole.state_dict(), strict=False)
    folder = tmp_path_factory.mktemp("block")
    less.save_pretrained(folder)
    return folder


@torch.no_grad()
def answer(dit: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 256, generator=generator)
    conditions = {"resolution": None, "aspect_ratio": None}
    return dit(latent, text, torch.tensor([700, 700]), added_cond_kwargs=conditions, return_dict=False)[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_packs_loads_and_answers_as_it_did(composed: Compose, block: Path, tmp_path: Path, method: str):
    """With weights to nearest and transforms fitted to noise: what is tested is how they are kept."""
    torch.manual_seed(0)
    steps = plan(composed(f"method={method}"))
    weight, activation = steps["reconstruct"].make().weight, steps["activate"].make().activation
    dit = PixArtTransformer2DModel.from_pretrained(block)
    audit = policy.check_weights(dit, weight)
    plain = {name: own.clone() for name, own in dit.state_dict().items()}
    rules = policy.assign(policy.layers(dit), weight)
    layers = policy.quantize_weights_(dit, rules)
    grids, inputs = policy.quantize_activations_(dit, activation)
    for name, layer in layers.items():
        grid, layer.activation = layer.activation, torch.nn.Identity()
        layer.prepare(torch.randn(2, 8, layer.width) if layer.transforms else None)
        layer.freeze()
        layer.activation = grid
    for grid in grids.values():
        if grid.static:
            measure(grid)
    before = answer(dit)
    pack_transformer_(dit, rules, inputs)
    dit.save_pretrained(tmp_path)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert answer(again).equal(before)
    packed = sum(size(own) for own in again.modules() if isinstance(own, PackedLinear)) - size_of_others(again)
    counted = sum(own.bits * own.values for own in audit if own.rule != "-") / 8
    assert packed == pytest.approx(counted, rel=1e-3, abs=16 * len(layers))
