"""How SDNQ packs codes of 2 to 7 bits into bytes.

Codes of 2 and 4 bits follow each other from the low end of a byte. Of others, a few share as many
whole bytes as they have bits: the first codes keep their bits together, and what is left of each
byte takes bits of the last codes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp4dit.utils.bitpack import pack_bits, unpack_bits

Bits = Sequence[tuple[int, int]]  # the code and the bit of each bit of a byte, the lowest first


def run(code: int, *bits: int) -> list[tuple[int, int]]:
    """Return consecutive bits of a byte, from one code."""
    return [(code, bit) for bit in bits]


# The bytes of each group of codes.
BYTES: dict[int, list[Bits]] = {
    3: [
        *(run(i, 0, 1, 2) + run(3 + i, 0, 1, 2) + run(6 + i, 0, 1) for i in (0, 1)),
        run(2, 0, 1, 2) + run(5, 0, 1, 2) + run(6, 2) + run(7, 2),
    ],
    5: [
        *(run(i, *range(5)) + run(5 + i, 0, 1, 2) for i in (0, 1, 2)),
        run(3, *range(5)) + run(5, 3, 4) + run(7, 4),
        run(4, *range(5)) + run(6, 3, 4) + run(7, 3),
    ],
    6: [run(i, *range(6)) + run(3, 4 - 2 * i, 5 - 2 * i) for i in (0, 1, 2)],
    7: [run(i, *range(7)) + run(7, 6 - i) for i in range(7)],
}


def codes_per_group(bits: int) -> int:
    """Return how many codes share bytes of their own."""
    return 8 * len(BYTES[bits]) // bits if bits in BYTES else 8 // bits


def pack(codes: UInt8[Tensor, "n"], bits: int) -> UInt8[Tensor, "..."]:
    """Return the bytes of codes of 2 to 7 bits, whose number is a multiple of `codes_per_group`.

    The bytes are a vector for 2 and 4 bits, and have a row for each group otherwise.
    """
    if bits not in BYTES:
        return pack_bits(codes.flatten(), bits)
    groups = codes.reshape(-1, codes_per_group(bits))
    packed = torch.zeros(len(groups), len(BYTES[bits]), dtype=torch.uint8)
    for i, sources in enumerate(BYTES[bits]):
        for place, (code, bit) in enumerate(sources):
            packed[:, i] |= (groups[:, code] >> bit & 1) << place
    return packed


def unpack(packed: UInt8[Tensor, "..."], bits: int) -> UInt8[Tensor, "n"]:
    """Undo `pack`."""
    if bits not in BYTES:
        return unpack_bits(packed.flatten(), bits, packed.numel() * 8 // bits)
    groups = packed.reshape(-1, len(BYTES[bits]))
    codes = torch.zeros(len(groups), codes_per_group(bits), dtype=torch.uint8)
    for i, sources in enumerate(BYTES[bits]):
        for place, (code, bit) in enumerate(sources):
            codes[:, code] |= (groups[:, i] >> place & 1) << bit
    return codes.flatten()
