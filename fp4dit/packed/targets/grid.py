"""Weights as points of a number format and the qparams of their blocks.

This is what packed layers and the formats of other libraries have in common.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.formats import Format, integer
from fp4dit.numerics.qparams import Affine, QParams, Scale, as_tensors, from_tensors
from fp4dit.numerics.quantizer import PerChannel, PerGroup
from fp4dit.packed.encoding.layout import Layout, PackedBuffers
from fp4dit.packed.encoding.packing import pack_points
from fp4dit.packed.encoding.qparams import FormatIndices
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.utils.errors import UserError

PLAIN = "export_format.dense=[...] writes it as a plain weight"


@dataclass(frozen=True)
class GridWeight:
    """A weight of one number format, whose blocks lie within rows.

    Attributes:
        fmt: The number format.
        points: The value of each code, before qparams are applied.
        qparams: The qparams in fp32, a row for each block.
        width: The number of values in a block.

    Example:
        >>> grid = read_grid(packed_layer)
        >>> grid.dequantize().equal(packed_layer.dequantize(torch.float32))
        True
    """

    fmt: Format
    points: Float[Tensor, "o k"]
    qparams: QParams
    width: int

    @property
    def blocks_per_row(self) -> int:
        """The number of blocks in a row."""
        return self.points.shape[1] // self.width

    def by_row(self, column: Float[Tensor, "blocks 1"]) -> Float[Tensor, "o n"]:
        """Return a tensor of the qparams with a row for each row of the weight."""
        return column.view(len(self.points), self.blocks_per_row)

    def dequantize(self) -> Float[Tensor, "o k"]:
        """Return the weight in fp32."""
        blocks = self.points.reshape(-1, self.width)
        return self.qparams.from_grid(blocks).view(self.points.shape)


def read_grid(layer: PackedLinear, with_transforms: bool = False) -> GridWeight:
    """Return the weight of a packed layer as points of one number format.

    Args:
        layer: The packed layer.
        with_transforms: Whether the layer may transform its input. The weight is the transformed
            one.

    Raises:
        UserError: if the layer transforms its input, or if its blocks have several formats.
    """
    layout, shape = layer.layout, torch.Size([layer.out_features, layer.in_features])
    if layer.transform_chain and not with_transforms:
        names = ", ".join(type(transform).__name__ for transform in layer.transform_chain)
        raise UserError(f"it transforms its input ({names}): use transform=none")
    if len(layout.formats) > 1:
        names = " or ".join(fmt.name for fmt in layout.formats)
        raise UserError(f"its values are {names}: use one number format, or {PLAIN}")
    if layout.shared_group_size > 1:
        raise UserError(f"its values share mantissa bits: {PLAIN}")
    points = layout.decode_codes(layer.packed_buffers, layer.in_features, layer.table)
    width, tensors = layout.granularity.width(shape), as_tensors(layer.qparams)
    if width > layer.in_features:  # one scale for several rows
        repeats = width // layer.in_features
        tensors = {name: value.repeat_interleave(repeats, 0) for name, value in tensors.items()}
        width = layer.in_features
    return GridWeight(layout.formats[0], points.view(shape), from_tensors(tensors), width)


def pack_grid(grid: GridWeight) -> tuple[Layout, PackedBuffers]:
    """Return the layout and the buffers of a weight.

    Raises:
        UserError: if it cannot be packed, or contains NaN or infinity.
    """
    for value in (grid.points, *as_tensors(grid.qparams).values()):
        if not value.isfinite().all():
            raise UserError("a weight or a scale is NaN or infinite: the file is damaged")
    rows, k = grid.points.shape
    granularity = PerChannel() if grid.width == k else PerGroup(grid.width)
    index = make_format_index(rows * grid.blocks_per_row)
    return pack_points(grid.points, grid.qparams, granularity, (grid.fmt,), index)


def make_format_index(n: int) -> FormatIndices:
    """Return the format index of n blocks that all have the only format."""
    return torch.zeros(1, dtype=torch.uint8).expand(n)


def require_format(grid: GridWeight, fmt: Format) -> None:
    """Raise a UserError if a weight has another number format."""
    if grid.fmt != fmt:
        raise UserError(
            f"its values are {grid.fmt.name}, and not {fmt.name}: use weight.format={fmt.name}, or "
            f"{PLAIN}"
        )


def require_scale(grid: GridWeight) -> Float[Tensor, "blocks 1"]:
    """Return the scales of a weight that has nothing else.

    Raises:
        UserError: if it has zero points, offsets or two scales for a block.
    """
    if not isinstance(grid.qparams, Scale):
        names = " and ".join(as_tensors(grid.qparams))
        raise UserError(
            f"its blocks have {names}, and not a scale alone: use weight.scale.rule=absmax"
        )
    return grid.qparams.scale


def require_width(grid: GridWeight, widths: Sequence[int]) -> None:
    """Raise a UserError if another number of values share a scale."""
    if grid.width not in widths:
        numbers = " or ".join(map(str, widths))
        raise UserError(
            f"{grid.width} values share a scale, and not {numbers}: use "
            f"weight.granularity.size={widths[0]}, or {PLAIN}"
        )


def read_integers(grid: GridWeight, bits: int) -> tuple[Float[Tensor, "o k"], Affine]:
    """Return the points of an integer weight and its qparams, as unsigned integers of `bits` bits.

    Signed integers get a zero point in the middle of the range.

    Raises:
        UserError: if the weight does not consist of such integers.
    """
    middle = 2 ** (bits - 1)
    if grid.fmt == integer(bits, signed=False) and isinstance(grid.qparams, Affine):
        return grid.points, grid.qparams
    if grid.fmt != integer(bits):
        raise UserError(
            f"its values are {grid.fmt.name}, and not int{bits}: use weight.format=int{bits}, or "
            f"{PLAIN}"
        )
    scale = require_scale(grid)
    return grid.points + middle, Affine(scale, torch.full_like(scale, middle))


def make_integer_grid(
    points: Float[Tensor, "o k"], scale: Float[Tensor, "o n"], zero: Float[Tensor, "o n"], bits: int
) -> GridWeight:
    """Make a weight of unsigned integers of `bits` bits.

    They become signed ones if all zero points are in the middle and the lowest integer is not used.
    """
    width, middle = points.shape[1] // scale.shape[1], 2 ** (bits - 1)
    scale, zero = scale.reshape(-1, 1).float(), zero.reshape(-1, 1).float()
    if (zero == middle).all() and (points > 0).all():
        return GridWeight(integer(bits), points - middle, Scale(scale), width)
    return GridWeight(integer(bits, signed=False), points, Affine(scale, zero), width)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of a weight, whose other dimensions than the first are joined."""
    return shape[0], prod(shape[1:])
