"""Packed weights as the integer kernels read them."""

from functools import lru_cache

import torch
from jaxtyping import Float32
from torch import Tensor

from fp4dit.numerics.formats import Format, NumberFormat
from fp4dit.packed.encoding.codes import list_code_values
from fp4dit.packed.encoding.layout import Layout, PackedBuffers
from fp4dit.packed.encoding.qparams import (
    E4M3Encoding,
    E8M0Encoding,
    FloatEncoding,
    FormatIndices,
)
from fp4dit.packed.nn.integer_operands import MAX_WEIGHT, IntegerWeight

NUM_ZERO_POINTS = 16  # 0 to 15, of unsigned 4-bit weights


def describe_weight(layout: Layout, buffers: PackedBuffers, k: int) -> IntegerWeight | None:
    """Return a packed weight of k columns as the integer kernels read it, or None if they cannot.

    They read codes of 4 or 8 bits whose values are whole numbers of at most 127 times a power of
    two, with a scale for each row or group, or one for all. There may be several formats, or zero
    points.
    """
    has_zero_points = "zero" in layout.encodings
    if not layout.encodings.keys() <= {"scale", "zero"} or layout.shared_group_size > 1:
        return None
    formats = tuple(layout.formats)
    tables = build_tables(formats, has_zero_points)
    if tables is None:
        return None
    n = len(buffers["codes"])
    width = layout.granularity.width(torch.Size([n, k]))
    format_index = layout.read_format_index(buffers, n * k // width)
    table_index = format_index.contiguous() if layout.format_index_bits else None
    if has_zero_points:
        zero = layout.decode_qparam("zero", buffers, format_index)
        if not torch.isin(zero, torch.arange(NUM_ZERO_POINTS)).all():
            return None  # such as those of a signed format
        table_index = zero.to(torch.uint8)
    if table_index is not None and int(table_index.amax()) >= len(tables):
        return None  # The bytes are damaged.
    scales, scale_bytes, scale_values = describe_scales(layout, buffers, format_index)
    if width > k:  # one scale for all rows
        table_index = None if table_index is None else table_index.expand(n).contiguous()
        scales = layout.decode_qparam("scale", buffers, format_index).expand(n).contiguous()
        scale_bytes, scale_values = 4, None
    return IntegerWeight(
        shape=(n, k),
        group=min(width, k),
        largest=int(tables.abs().amax()),
        codes=buffers["codes"],
        tables=tables,
        table_index=table_index,
        scales=scales,
        scale_bytes=scale_bytes,
        scale_values=scale_values,
        factors=build_factors(formats, len(tables)),
    )


@lru_cache
def build_tables(formats: tuple[Format, ...], has_zero_points: bool) -> Tensor | None:
    """Return the whole numbers of every byte of codes, in a table for each format or zero point.

    Returns:
        int8 of shape (tables, 256, codes of a byte); None if the formats have no such numbers.
    """
    bits = formats[0].bits if formats else 0  # the same for all
    if bits not in (4, 8) or (len(formats) > 1 and has_zero_points):
        return None
    tables = []
    for fmt in formats:
        if not isinstance(fmt, NumberFormat):
            return None
        numbers = list_code_values(fmt).nan_to_num() / fmt.smallest
        for zero in range(NUM_ZERO_POINTS if has_zero_points else 1):
            tables.append(numbers - zero / fmt.smallest)
    numbers = torch.stack(tables)
    if numbers.abs().amax() > MAX_WEIGHT:
        return None
    numbers = numbers.to(torch.int8)
    if bits == 8:
        magnitudes = torch.arange(128, dtype=torch.int8)
        # The kernels know no other 8-bit codes than a sign and a magnitude.
        if not all(table.equal(torch.cat([magnitudes, -magnitudes])) for table in numbers):
            return None
        return numbers[..., None]
    return torch.stack([numbers.repeat(1, 16), numbers.repeat_interleave(16, 1)], -1)


@lru_cache
def build_factors(formats: tuple[NumberFormat, ...], num_tables: int) -> Float32[Tensor, "tables"]:
    """Return for each table the smallest value of its format."""
    smallest = torch.tensor([fmt.smallest for fmt in formats])
    return smallest if len(smallest) == num_tables else smallest.expand(num_tables).contiguous()


def describe_scales(
    layout: Layout, buffers: PackedBuffers, format_index: FormatIndices
) -> tuple[Tensor, int, Float32[Tensor, "rows 256"] | None]:
    """Return the stored scales, the bytes of one, and the scale of each byte if it is one."""
    encoding = layout.encodings["scale"]
    if isinstance(encoding, FloatEncoding):
        return buffers["scale"], encoding.num_bytes, None
    if isinstance(encoding, E4M3Encoding | E8M0Encoding):
        num_rows = encoding.num_factors if isinstance(encoding, E4M3Encoding) else 1
        code = torch.arange(256, dtype=torch.uint8)
        rows = []
        for i in range(num_rows):
            table_buffers = {**buffers, "scale": code}
            rows.append(layout.decode_qparam("scale", table_buffers, torch.full_like(code, i)))
        return buffers["scale"], 1, torch.stack(rows)
    return layout.decode_qparam("scale", buffers, format_index).contiguous(), 4, None
