"""What one sample takes on its way through a model, against closed forms; against real runs in test_models.py."""

import torch
from torch import nn

from fp4dit.calls import Call
from fp4dit.footprint import Memory, bit_operations, footprint, kept
from fp4dit.formats import integer
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from tests.test_published import skeleton


def test_operations_of_a_block_in_closed_form():
    """PixArt-alpha at 512 px: 1,024 tokens of width 1,152, and 120 tokens of text."""
    tokens, text, width = 1024, 120, 1152
    [block] = [
        one
        for one in footprint(PixArtPipeline(skeleton("pixart_alpha_512", num_layers=1).to("meta"), text)).passes
        if one.unit == "transformer_blocks.0"
    ]
    linear = tokens * (4 + 2 + 8) * width**2 + text * 2 * width**2  # self-attention, cross-attention, feed-forward
    attention = 2 * tokens * (tokens + text) * width
    assert block.flops == 2 * (linear + attention)
    assert block.left == {"hidden": 4 * tokens * width}


def test_bit_operations_of_a_block_in_closed_form():
    """As above: its layers at 4 and 6 bits, its attention at 16."""
    tokens, text, width = 1024, 120, 1152
    pipeline = lambda: PixArtPipeline(skeleton("pixart_alpha_512", num_layers=1).to("meta"), text)
    four, six = (Quantizer(integer(bits), Granularity("row")) for bits in (4, 6))
    linear = tokens * (4 + 2 + 8) * width**2 + text * 2 * width**2
    full = bit_operations(pipeline(), [], [])
    both = bit_operations(pipeline(), [Rule("transformer_blocks.*", four)], [Rule("transformer_blocks.*", six)])
    weights = bit_operations(pipeline(), [Rule("transformer_blocks.*", four)], [])
    assert full == 256 * footprint(pipeline()).flops // 2
    assert full - both == (16 * 16 - 4 * 6) * linear
    assert full - weights == (16 * 16 - 4 * 16) * linear


def test_memory_counts_what_is_there():
    x = torch.empty(1000, device="meta")
    with Memory() as memory:
        y = x + 1
        z = y.view(10, 100).T * 2
        assert (memory.alive, memory.most) == (8000, 8000)
        del y
        assert (memory.alive, memory.most) == (4000, 8000)
        del z
    assert memory.alive == 0


def test_a_gradient_keeps_what_each_layer_was_given():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)).to("meta").requires_grad_(False)
    x = torch.empty(5, 8, device="meta")
    assert kept(model, Call((x,), {})) == 4 * 5 * (32 + 32 + 4)  # the input is the caller's
    assert not any(p.requires_grad for p in model.parameters())
