"""Footprints against closed forms; tests/models compares them with real runs."""

import torch
from torch import nn

from fp4dit.estimate.footprint import (
    MemoryTracker,
    count_bit_operations,
    measure_footprint,
    measure_saved_bytes,
)
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.numerics.formats import integer
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.quantization.rules import Rule
from fp4dit.utils.calls import Call
from tests.models.test_published_models import build_skeleton


def test_operations_of_a_block_in_closed_form():
    """PixArt-alpha at 512 px: 1,024 tokens of width 1,152, and 120 tokens of text."""
    tokens, text, width = 1024, 120, 1152
    pipeline = PixArtAdapter(build_skeleton("pixart_alpha_512", num_layers=1).to("meta"), text)
    units = {unit.unit: unit for unit in measure_footprint(pipeline).units}
    block = units["transformer_blocks.0"]
    # The three terms are self-attention, cross-attention and the feed-forward layers.
    linear = tokens * (4 + 2 + 8) * width**2 + text * 2 * width**2
    attention = 2 * tokens * (tokens + text) * width
    assert block.flops == 2 * (linear + attention)
    assert block.output_bytes == {"hidden": 4 * tokens * width}


def test_bit_operations_of_a_block_in_closed_form():
    """The layers have weights of 4 bits and inputs of 6 bits, and attention has 16 bits."""
    tokens, text, width = 1024, 120, 1152

    def make_pipeline() -> PixArtAdapter:
        return PixArtAdapter(build_skeleton("pixart_alpha_512", num_layers=1).to("meta"), text)

    four, six = (Quantizer(integer(bits), PerChannel()) for bits in (4, 6))
    linear = tokens * (4 + 2 + 8) * width**2 + text * 2 * width**2
    full = count_bit_operations(make_pipeline(), [], [])
    both = count_bit_operations(
        make_pipeline(), [Rule("transformer_blocks.*", four)], [Rule("transformer_blocks.*", six)]
    )
    weights = count_bit_operations(make_pipeline(), [Rule("transformer_blocks.*", four)], [])
    assert full == 256 * measure_footprint(make_pipeline()).flops // 2
    assert full - both == (16 * 16 - 4 * 6) * linear
    assert full - weights == (16 * 16 - 4 * 16) * linear


def test_the_memory_tracker_counts_live_tensors():
    x = torch.empty(1000, device="meta")
    with MemoryTracker() as memory:
        y = x + 1
        z = y.view(10, 100).T * 2
        assert (memory.live_bytes, memory.peak_bytes) == (8000, 8000)
        del y
        assert (memory.live_bytes, memory.peak_bytes) == (4000, 8000)
        del z
    assert memory.live_bytes == 0


def test_the_inputs_of_layers_are_saved_for_gradients():
    model = (
        nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
        .to("meta")
        .requires_grad_(False)
    )
    x = torch.empty(5, 8, device="meta")
    # The input of the model is not counted, because it exists before the call.
    assert measure_saved_bytes(model, Call((x,), {})) == 4 * 5 * (32 + 32 + 4)
    assert not any(p.requires_grad for p in model.parameters())
