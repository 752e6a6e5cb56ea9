"""Convert a quantized weight to packed buffers of bytes, and back.

A layout says which buffers a weight has, and what their bytes mean. The `config.json` of a
checkpoint contains it, so its fields are part of the file format. To change them or the buffers,
change `buffer_shapes`, `pack_weight` and `dequantize` together, the JSON that
`tests/packed/test_schema.py` pins, docs/reference/checkpoint.md, and the version (see `VERSION` in
`integrity.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import QParams, Scale, as_tensors, from_tensors
from fp4dit.numerics.quantizer import Granularity
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.packed.encoding.codes import (
    build_byte_table,
    count_code_bits,
    list_code_values,
)
from fp4dit.packed.encoding.qparams import FormatIndices, QParamEncoding, SignedE4M3Encoding
from fp4dit.utils.bitpack import packed_size, unpack_bits

WeightMatrix = Float[Tensor, "o k"]

PackedBuffers = Mapping[str, UInt8[Tensor, "..."]]

# Values that are dequantized at a time on a CPU. In fp32 they fit the cache of one core.
WEIGHT_CHUNK_VALUES = 2**18


@dataclass(frozen=True)
class Layout:
    """Description of the packed buffers of a weight of o rows and k columns.

    The buffers are:

    - `codes`: one row of packed codes for each row of the weight.
    - `shared_bits`: one bit for each group of values that share their last mantissa bit. Their
      codes lack this bit.
    - `format_index`: for each block its index in `formats`, if there are several formats and no
      scale holds the index in its sign bit.
    - one or two buffers for each tensor of the qparams, in the order of the blocks.

    Args:
        formats: The number formats of the blocks, of the same number of bits.
        granularity: The division of the weight into blocks.
        encodings: The encoding of each tensor of the qparams, by its name.

    Example:
        >>> layout = Layout((floating(2, 1),), PerGroup(128), {"scale": FloatEncoding(2)})
        >>> layout.buffer_shapes(64, 256)
        {'codes': (64, 128), 'scale': (256,)}
    """

    formats: Sequence[Format]
    granularity: Granularity
    encodings: Mapping[str, QParamEncoding]

    @property
    def shared_group_size(self) -> int:
        """The number of values that share their last mantissa bit; 1 if none do."""
        fmt = self.formats[0]
        return fmt.share if isinstance(fmt, SharedMantissa) else 1

    @property
    def stored_code_bits(self) -> int:
        """The bits of one code in `codes`, without a shared bit."""
        return count_code_bits(self.formats[0]) - (self.shared_group_size > 1)

    @property
    def format_index_bits(self) -> int:
        """The bits that say which format a block has; 0 if there is only one."""
        return (len(self.formats) - 1).bit_length()

    @property
    def signed_qparam(self) -> str | None:
        """The name of the qparams whose sign bits say which format a block has, if there are."""
        for name, encoding in self.encodings.items():
            if isinstance(encoding, SignedE4M3Encoding):
                return name
        return None

    @property
    def stores_format_index(self) -> bool:
        """True if the formats of blocks have a buffer of their own."""
        return self.format_index_bits > 0 and self.signed_qparam is None

    @property
    def decodes_bytes_by_table(self) -> bool:
        """True if a byte holds two complete codes, which one look-up then decodes."""
        has_whole_codes = self.shared_group_size == 1 and not self.format_index_bits
        return has_whole_codes and self.stored_code_bits == 4

    def shared_groups_per_block(self, width: int) -> int:
        """Return the number of groups with a shared bit in a block of `width` values."""
        return -(-width // self.shared_group_size)

    def buffer_shapes(self, o: int, k: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each buffer of a weight of o rows and k columns."""
        width = self.granularity.width(torch.Size([o, k]))
        blocks = o * k // width
        shapes: dict[str, tuple[int, ...]] = {"codes": (o, packed_size(k, self.stored_code_bits))}
        if self.shared_group_size > 1:
            groups = blocks * self.shared_groups_per_block(width)
            shapes["shared_bits"] = (packed_size(groups, 1),)
        if self.stores_format_index:
            shapes["format_index"] = (packed_size(blocks, self.format_index_bits),)
        for name, encoding in self.encodings.items():
            for part, size in encoding.part_sizes(blocks).items():
                shapes[buffer_name(name, part)] = (size,)
        return shapes

    def build_lookup_table(self) -> Tensor:
        """Return the table that `decode_codes` reads.

        It holds the values of all codes, or of all bytes if bytes are decoded whole.
        """
        if self.decodes_bytes_by_table:
            return build_byte_table(self.formats[0])
        return torch.cat([list_code_values(fmt) for fmt in self.formats])

    def dequantize(
        self, buffers: PackedBuffers, k: int, table: Tensor, dtype: torch.dtype = torch.float32
    ) -> WeightMatrix:
        """Return the weight: qparams are applied in fp32, and the result is cast to `dtype`.

        On a CPU this is done by some rows at a time, so that they stay in the cache.
        """
        codes = buffers["codes"]
        width = self.granularity.width(torch.Size([len(codes), k]))
        qparams = self.decode_qparams(
            buffers, self.read_format_index(buffers, len(codes) * k // width)
        )
        in_chunks = codes.is_cpu and self.decodes_bytes_by_table and k % width == 0
        if dtype == torch.float32 or not in_chunks:
            return apply_qparams(self.decode_codes(buffers, k, table), qparams, width).to(dtype)
        weight = torch.empty(len(codes), k, dtype=dtype)
        rows = max(1, WEIGHT_CHUNK_VALUES // k)
        chunks = zip(
            weight.split(rows),
            codes.split(rows),
            split_qparams(qparams, rows * k // width),
            strict=True,
        )
        for weight_rows, code_rows, row_qparams in chunks:
            values = self.decode_codes({"codes": code_rows}, k, table)
            weight_rows.copy_(apply_qparams(values, row_qparams, width))
        return weight

    def decode_codes(self, buffers: PackedBuffers, k: int, table: Tensor) -> WeightMatrix:
        """Return the value of each code, before qparams are applied."""
        codes = buffers["codes"]
        if self.decodes_bytes_by_table:
            value_pairs = table.index_select(0, codes.flatten().int())
            return value_pairs.view(torch.float32).view(len(codes), -1)[:, :k]
        width = self.granularity.width(torch.Size([len(codes), k]))
        unpacked = unpack_bits(codes, self.stored_code_bits, k)
        index = self.merge_shared_bits(unpacked, buffers, width).int()
        if self.format_index_bits:
            format_index = self.read_format_index(buffers, len(index)).int()
            index += format_index[:, None] << count_code_bits(self.formats[0])
        return table.index_select(0, index.flatten()).view(len(codes), k)

    def read_format_index(self, buffers: PackedBuffers, blocks: int) -> FormatIndices:
        """Return the index of each block's format."""
        if self.signed_qparam is not None:
            return buffers[self.signed_qparam] >> 7
        if self.format_index_bits:
            return unpack_bits(buffers["format_index"], self.format_index_bits, blocks)
        return buffers["codes"].new_zeros(1).expand(blocks)

    def merge_shared_bits(
        self, codes: UInt8[Tensor, "o k"], buffers: PackedBuffers, width: int
    ) -> UInt8[Tensor, "blocks width"]:
        """Append to each code the bit that it shares with its group."""
        blocks = codes.reshape(-1, width)
        if self.shared_group_size == 1:
            return blocks
        groups = self.shared_groups_per_block(width)
        shared = unpack_bits(buffers["shared_bits"], 1, len(blocks) * groups).view(-1, groups)
        return blocks << 1 | shared.repeat_interleave(self.shared_group_size, 1)[:, :width]

    def decode_qparams(self, buffers: PackedBuffers, format_index: FormatIndices) -> QParams:
        """Return the qparams in fp32, a row for each block."""
        tensors = {}
        for name in self.encodings:
            tensors[name] = self.decode_qparam(name, buffers, format_index).view(-1, 1)
        return from_tensors(tensors)

    def decode_qparam(
        self, name: str, buffers: PackedBuffers, format_index: FormatIndices
    ) -> Float[Tensor, "blocks"]:
        """Return one tensor of the qparams in fp32, a number for each block."""
        encoding = self.encodings[name]
        parts = {}
        for part in encoding.part_sizes(len(format_index)):
            parts[part] = buffers[buffer_name(name, part)]
        return encoding.decode(parts, format_index)


def apply_qparams(values: WeightMatrix, qparams: QParams, width: int) -> WeightMatrix:
    """Map values of the format's grid to the weight.

    `values` may be overwritten, because new memory costs more than the arithmetic.
    """
    blocks = values.reshape(-1, width)
    if isinstance(qparams, Scale):
        return blocks.mul_(qparams.scale).view(values.shape)
    return qparams.from_grid(blocks).view(values.shape)


def split_qparams(qparams: QParams, blocks: int) -> list[QParams]:
    """Split qparams into pieces of `blocks` blocks each. The last piece may be smaller."""
    pieces_by_name = {name: value.split(blocks) for name, value in as_tensors(qparams).items()}
    pieces = []
    for tensors in zip(*pieces_by_name.values(), strict=True):
        pieces.append(from_tensors(dict(zip(pieces_by_name, tensors, strict=True))))
    return pieces


def buffer_name(name: str, part: str) -> str:
    """Return the name of the buffer of one part of an encoded tensor."""
    return f"{name}_{part}" if part else name
