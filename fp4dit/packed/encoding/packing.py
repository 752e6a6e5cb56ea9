"""Pack a weight whose values lie on a grid into the buffers of a layout."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams, as_tensors
from fp4dit.numerics.quantizer import Granularity
from fp4dit.packed.encoding.codes import encode_values, list_code_values
from fp4dit.packed.encoding.layout import Layout, WeightMatrix, buffer_name
from fp4dit.packed.encoding.qparams import FormatIndices, smallest_encoding
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.utils.bitpack import pack_bits
from fp4dit.utils.errors import UserError


def pack_weight(
    weight: WeightMatrix, fake_quant: FakeQuantize
) -> tuple[Layout, dict[str, UInt8[Tensor, "..."]]]:
    """Pack a weight whose values lie on the grid of `fake_quant`.

    Raises:
        UserError: if a value does not lie on the grid, or if the format or the scales cannot be
            packed.
    """
    granularity, qparams = fake_quant.quantizer.granularity, fake_quant.qparams
    assert qparams is not None, "round the weight first"
    blocks = granularity.split(weight).float()
    formats, format_index = read_chosen_formats(fake_quant, len(blocks))
    points = fake_quant.format.nearest(qparams.to_grid(blocks)).cpu().view(weight.shape)
    layout, buffers = pack_points(points, qparams, granularity, formats, format_index)
    unpacked = layout.dequantize(buffers, weight.shape[1], layout.build_lookup_table())
    if not unpacked.to(weight.dtype).equal(weight.cpu()):
        raise UserError(
            "the weight does not lie on its grid: it was changed after it was rounded, or never "
            "rounded"
        )
    return layout, buffers


def pack_points(
    points: WeightMatrix,
    qparams: QParams,
    granularity: Granularity,
    formats: Sequence[Format],
    format_index: FormatIndices,
) -> tuple[Layout, dict[str, UInt8[Tensor, "..."]]]:
    """Pack a weight that is given by its points on the grid and its qparams.

    Args:
        points: The values of the formats that the weight consists of, before qparams are applied.
        qparams: The qparams of the blocks.
        granularity: The division of the weight into blocks.
        formats: The number formats of the blocks.
        format_index: The index of each block's format.

    Raises:
        UserError: if the qparams are not constant within a block, or the format has too many bits.
        ValueError: if a point is not a value of its format, or a scale is not finite.
    """
    encodings, buffers = {}, {}
    for name, value in as_tensors(qparams).items():
        column = flatten_qparam(value, len(format_index))
        encodings[name], parts = smallest_encoding(column, format_index, len(formats))
        for part, data in parts.items():
            buffers[buffer_name(name, part)] = data
    layout = Layout(formats, granularity, encodings)
    codes = encode_blocks(granularity.split(points), formats, format_index)
    if layout.shared_group_size > 1:
        shared = (codes & 1)[:, :: layout.shared_group_size]
        buffers["shared_bits"] = pack_bits(shared.flatten(), 1)
        codes >>= 1
    buffers["codes"] = pack_bits(codes.view(points.shape), layout.stored_code_bits)
    if layout.stores_format_index:
        buffers["format_index"] = pack_bits(format_index, layout.format_index_bits)
    return layout, buffers


def flatten_qparam(value: Tensor, blocks: int) -> Float[Tensor, "blocks"]:
    """Return a tensor of qparams as a vector with one entry for each block.

    Raises:
        UserError: if the qparams are not constant within a block.
    """
    if value.shape != (blocks, 1):
        raise UserError(
            "a weight that is scaled by input channel is not packed: give it one scale per row or "
            "group"
        )
    return value.flatten().float().cpu()


def read_chosen_formats(
    fake_quant: FakeQuantize, blocks: int
) -> tuple[tuple[Format, ...], FormatIndices]:
    """Return the formats that blocks may have, and the index of each block's format."""
    candidates = fake_quant.quantizer.format
    if isinstance(candidates, FormatSelection):
        format_index = fake_quant.calibrated_tensors()["choice"].cpu()
        if len(format_index) > 1:
            return tuple(candidates.formats), format_index[:, 0]
    return (fake_quant.format,), torch.zeros(1, dtype=torch.uint8).expand(blocks)


def encode_blocks(
    x: Blocks, formats: Sequence[Format], format_index: FormatIndices
) -> UInt8[Tensor, "blocks block"]:
    """Return the code of each value, in the format of its block."""
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for i, fmt in enumerate(formats):
        codes[format_index == i] = encode_values(x[format_index == i], list_code_values(fmt))
    return codes
