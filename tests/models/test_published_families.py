"""Families of conf/model that are based on `generic`: true sizes without weights and network."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import pipelines.inspect
from benchmarks.published import is_traced
from fp4dit.estimate.footprint import measure_footprint
from fp4dit.models.generic import Generic
from fp4dit.quantization.audit import audit_weights
from fp4dit.quantization.roles import resolve_roles
from fp4dit.quantization.rules import Rule, find_layers
from pipelines.config.resolvers import list_options
from pipelines.planning.instantiate import instantiate_node
from tests.conftest import Compose, Run

# The sizes of 1024 x 1024 px in patches of 16 x 16 px, and of 81 frames of 832 x 480 px in latents
# for 4 frames, after the first one, in patches of 16 x 16 px.
SQUARE, CLIP = 64 * 64, 21 * 52 * 30


@dataclass(frozen=True)
class Published:
    """What is known of a published transformer.

    Args:
        values: The number of values in its safetensors, as the hub counts them, or in billions as
            its authors round it.
        layers: The number of its layers, by block.
        left: The number of those that stay in 16 bits.
        stream: A layer that reads each token once.
        tokens: The number of its tokens.
    """

    values: int | float
    layers: int
    left: int
    stream: str
    tokens: int


FLUX = "transformer_blocks.0.attn.to_q"
VIDEO = "blocks.0.attn1.to_q"

# Of each block: modulation, attention and feed-forward, of both streams if there are two.
FAMILIES = {
    "flux1_dev": Published(11901408320, 19 * (2 + 8 + 4) + 38 * (1 + 3 + 2) + 10, 11, FLUX, SQUARE),
    "flux1_schnell": Published(11891178560, 19 * 14 + 38 * 6 + 8, 9, FLUX, SQUARE),
    "qwen_image": Published(20430401088, 60 * (2 + 8 + 4) + 6, 8, FLUX, SQUARE),
    # Two blocks for the image alone, and two for the text alone, which are not modulated.
    "z_image": Published(
        6154908736, (30 + 2) * (1 + 4 + 3) + 2 * 7 + 6, 7, "layers.0.attention.to_q", SQUARE + 512
    ),
    # Thirteen blocks have a second attention. The last block has no text after its attention.
    "sd3_5_medium": Published(2469663936, 24 * 14 + 13 * 4 - 3 + 8, 8, FLUX, SQUARE),
    "sd3_5_large": Published(8.1, 38 * 14 - 3 + 8, 8, FLUX, SQUARE),
    "wan2_1_1_3b": Published(1418996800, 30 * (4 + 4 + 2) + 6, 6, VIDEO, CLIP),
    "wan2_1_14b": Published(14288491584, 40 * 10 + 6, 6, VIDEO, CLIP),
    "wan2_2_t2v_a14b": Published(14288491584, 40 * 10 + 6, 6, VIDEO, CLIP),
    "wan2_2_ti2v_5b": Published(4999787712, 30 * 10 + 6, 6, VIDEO, 31 * 40 * 22),
    # The depthwise convolutions of its 20 blocks cannot be quantized.
    "sana": Published(
        1.6, 20 * (4 + 4 + 3) + 7, 7 + 20, "transformer_blocks.0.attn1.to_q", 32 * 32
    ),
    "chroma": Published(8.9, 19 * (8 + 4) + 38 * (3 + 2) + 2 * 5 + 5, 15, FLUX, SQUARE),
    "lumina2": Published(
        2609769152, (26 + 2) * (1 + 4 + 3) + 2 * 7 + 6, 7, "layers.0.attn.to_q", SQUARE + 256
    ),
    "auraflow": Published(
        6.8,
        4 * (2 + 8 + 6) + 32 * (1 + 4 + 3) + 6,
        6,
        "joint_transformer_blocks.0.attn.to_q",
        SQUARE,
    ),
    "ltx_video": Published(
        1923385472, 28 * (4 + 4 + 2) + 7, 7, "transformer_blocks.0.attn1.to_q", 21 * 22 * 16
    ),
    # Beside the blocks, a refiner of two blocks for the text.
    "hunyuan_video": Published(13.0, 20 * 14 + 40 * 6 + 2 * 7 + 13, 27, FLUX, 33 * 80 * 45),
    "cogvideox_5b": Published(
        5570283072, 42 * (2 + 4 + 2) + 6, 6, "transformer_blocks.0.attn1.to_q", 13 * 45 * 30 + 226
    ),
    # All blocks share their modulation.
    "flux2_klein": Published(3875544576, 5 * (8 + 4) + 20 * 2 + 9, 9, FLUX, SQUARE),
    "flux2_dev": Published(32223281152, 8 * 12 + 48 * 2 + 11, 11, FLUX, SQUARE),
    "hunyuanimage_2_1": Published(17425795520, 20 * 14 + 40 * 6 + 2 * 7 + 13, 27, FLUX, SQUARE),
}


def shorten_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a transformer with one block in each list."""
    shortened = dict(config)
    for name, value in config.items():
        if name.endswith("_layers") and isinstance(value, int):
            shortened[name] = 1
    return shortened


def test_every_family_is_here():
    assert set(FAMILIES) == set(filter(is_traced, list_options("model"))) - {"generic"}


@pytest.mark.parametrize("option", FAMILIES)
def test_sizes_and_shapes_need_no_weights_and_no_network(
    composed: Compose, option: str, monkeypatch: pytest.MonkeyPatch
):
    """`method=fp4dit` finds the layers before activation functions, and leaves sensitive layers."""
    monkeypatch.setattr(Generic, "load", lambda _: pytest.fail("weights are loaded"))
    # The rows of Sana are multiples of 64.
    config = composed(f"model={option}", "method=fp4dit", "weight.granularity.size=64")
    source, rules = (instantiate_node(name, config[name]) for name in ("model", "weight"))
    check_layers(source.build_on_meta().transformer, rules, FAMILIES[option])
    check_shapes(source, rules, FAMILIES[option], monkeypatch)


def check_layers(transformer: Any, rules: list[Rule], known: Published) -> None:
    """Check the number of values and of layers, and what the rules do to them."""
    count = sum(tensor.numel() for tensor in transformer.state_dict().values())
    if isinstance(known.values, int):
        assert count == known.values
    else:
        assert count / 1e9 == pytest.approx(known.values, rel=0.02)
    assert len(find_layers(transformer)) == known.layers
    audit = audit_weights(transformer, resolve_roles(rules, transformer))
    assert sum(entry.format == "fp16" for entry in audit) == known.left
    assert {"e2m1", "e3m0"} <= {entry.format for entry in audit}


def check_shapes(
    source: Generic, rules: list[Rule], known: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the shapes of activations, and that the units are found.

    The number of blocks changes no shape.
    """
    config = shorten_config(source.load_transformer_config())
    monkeypatch.setattr(Generic, "load_transformer_config", lambda _: config)
    adapter = source.build_on_meta()
    footprint = measure_footprint(adapter, resolve_roles(rules, adapter.transformer))
    assert all(unit.unit for unit in footprint.units)  # the transformer is not one unit
    shapes = footprint.activation_shapes
    assert shapes[known.stream][:2] == torch.Size([1, known.tokens])
    assert any(name.endswith(".q") for name in shapes)


def test_inspect_tells_bits_and_bytes(run: Run, capfd: pytest.CaptureFixture[str]):
    """E2M1 with one E4M3 scale for 16 weights is 4.5 bits; the rest has 16 bits."""
    arguments = ["model=flux2_klein", "method=nvfp4_rtn", "costs=false", "metrics=paired"]
    assert run(*arguments, main=pipelines.inspect.main) == 0
    output = capfd.readouterr().out
    width, hidden = 3072, 3 * 3072
    double = 8 * width**2 + 2 * 3 * width * hidden  # attention, and two gated feed-forwards
    single = width * (3 * width + 2 * hidden) + (width + hidden) * width
    quantized = 5 * double + 20 * single
    size = (4.5 * quantized + 16 * (3875544576 - quantized)) / 8
    assert "layers       100 of 109 quantized" in output
    assert f"checkpoint   {size / 1e9:.1f} GB; 7.8 GB in 16 bits" in output
