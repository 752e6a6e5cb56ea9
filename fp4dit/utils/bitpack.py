"""Pack integers of 1 to 8 bits densely into bytes, and unpack them."""

from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional as F


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that a row of `count` integers of `bits` bits takes."""
    return -(-count * bits // 8)


def pack_bits(values: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows b"]:
    """Pack each row into a string of bits, padded with zeros to whole bytes.

    Integers and bytes are filled from their lowest bit up. The first of two integers of 4 bits is
    therefore the low half of the byte.

    Raises:
        ValueError: if an integer does not fit into `bits` bits.
    """
    if not 1 <= bits <= 8 or bool((values.int() >> bits).any()):
        raise ValueError(f"there are values that do not fit into {bits} bits")
    *rows, n = values.shape
    # Eight integers fill `bits` whole bytes.
    groups = F.pad(values, (0, -n % 8)).view(*rows, -1, 8).int()
    packed = values.new_zeros(*rows, groups.shape[-2], bits)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        packed[..., byte] |= (groups[..., i] << offset).to(packed.dtype)
        if offset + bits > 8:
            packed[..., byte + 1] |= (groups[..., i] >> (8 - offset)).to(packed.dtype)
    return packed.flatten(-2)[..., : packed_size(n, bits)].contiguous()


def unpack_bits(packed: UInt8[Tensor, "*rows b"], bits: int, n: int) -> UInt8[Tensor, "*rows n"]:
    """Unpack the first `n` integers of each row."""
    if bits == 8:
        return packed[..., :n]
    *rows, _ = packed.shape
    groups = F.pad(packed, (0, -packed.shape[-1] % bits)).view(*rows, -1, bits)
    values = packed.new_empty(*rows, groups.shape[-2], 8)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        value: Int[Tensor, "*rows g"] = groups[..., byte] >> offset
        if offset + bits > 8:
            value = value | groups[..., byte + 1] << (8 - offset)
        values[..., i] = value & (2**bits - 1)
    return values.flatten(-2)[..., :n]
