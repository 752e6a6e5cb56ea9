"""Layers with one scale for each block, as other libraries keep them.

A conversion gives exactly the same weight, or it is refused.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import Scale
from fp4dit.numerics.quantizer import PerGroup
from fp4dit.packed.encoding.layout import Layout, PackedBuffers, buffer_name
from fp4dit.packed.encoding.qparams import FormatIndices, smallest_encoding
from fp4dit.packed.nn.linear import PackedConv, PackedLinear, make_empty_layer
from fp4dit.utils.errors import UserError


def read_block_scales(layer: PackedLinear, fmt: NumberFormat, width: int) -> Float[Tensor, "n"]:
    """Return the fp32 scales of a layer that consists of codes and block scales only.

    Args:
        fmt: the number format that the layer must have.
        width: the number of values of a row that must share a scale.

    Raises:
        UserError: if the layer has anything else.
    """
    for difference in list_differences(layer, fmt, width):
        raise UserError(difference)
    qparams = layer.qparams
    assert isinstance(qparams, Scale)
    return qparams.scale.flatten()


def list_differences(layer: PackedLinear, fmt: NumberFormat, width: int) -> Iterator[str]:
    """Yield what distinguishes a layer from codes of `fmt` with a scale for `width` values."""
    layout = layer.layout
    block_width = layout.granularity.width(torch.Size([layer.out_features, layer.in_features]))
    if isinstance(layer, PackedConv):
        yield "it is a convolution, and only linear layers can be"
    if layer.transform_chain:
        names = ", ".join(type(transform).__name__ for transform in layer.transform_chain)
        yield f"it transforms its input ({names})"
    if list(layout.formats) != [fmt]:
        names = " or ".join(candidate.name for candidate in layout.formats)
        yield f"its values are {names}, and not {fmt.name}"
    if set(layout.encodings) != {"scale"}:
        yield f"its blocks have {' and '.join(layout.encodings)}, and not a scale alone"
    if block_width != width:
        yield f"{block_width} values share a scale, and not {width}"


def make_block_layout(
    codes: UInt8[Tensor, "o b"], fmt: NumberFormat, width: int, scales: Float[Tensor, "rows blocks"]
) -> tuple[Layout, PackedBuffers]:
    """Make the layout and the buffers of a weight from codes and block scales.

    Raises:
        UserError: if there is not one scale for each block, or if a scale is not finite.
    """
    if scales.shape != (len(codes), codes.shape[1] * 8 // (fmt.bits * width)):
        raise UserError(
            f"there are scales {list(scales.shape)} for codes {list(codes.shape)} in blocks of "
            f"{width}"
        )
    if not scales.isfinite().all():
        raise UserError("a scale is NaN or infinite: the weight is damaged")
    flat = scales.flatten().cpu()
    encoding, parts = smallest_encoding(flat, make_format_index(len(flat)), 1)
    layout = Layout((fmt,), PerGroup(width), {"scale": encoding})
    buffers = {"codes": codes}
    for part, value in parts.items():
        buffers[buffer_name("scale", part)] = value
    return layout, buffers


def make_format_index(n: int) -> FormatIndices:
    """Return the format index of n blocks that all have the only format."""
    return torch.zeros(1, dtype=torch.uint8).expand(n)


def make_filled_layer(
    source: nn.Linear, layout: Layout, buffers: PackedBuffers, device: torch.device | str
) -> PackedLinear:
    """Make a packed layer in place of `source`, whose weight is not read.

    Raises:
        UserError: if the buffers do not have the shapes of such a weight.
    """
    layer = make_empty_layer(source, layout, (), device)
    for name, value in buffers.items():
        if value.shape != getattr(layer, name).shape:
            raise UserError(
                f"a weight of other shape than {[source.out_features, source.in_features]}"
            )
        getattr(layer, name).copy_(value)
    return layer
