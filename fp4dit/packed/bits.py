"""Numbers of a few bits, side by side in bytes."""

from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional as F


def size(count: int, bits: int) -> int:
    """Bytes that a row of so many numbers takes."""
    return -(-count * bits // 8)


def pack(numbers: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows b"]:
    """Each row as a string of bits, number by number and each number from its lowest bit, filled up with zeros.

    Bits fill a byte from its lowest one too. So of two numbers of 4 bits the first is the low half of the byte.

    Raises:
        ValueError: if a number has more bits.
    """
    if not 1 <= bits <= 8 or bool((numbers.int() >> bits).any()):
        raise ValueError(f"numbers that do not have {bits} bits")
    *rows, n = numbers.shape
    eights = F.pad(numbers, (0, -n % 8)).view(*rows, -1, 8).int()  # so many numbers fill whole bytes
    made = numbers.new_zeros(*rows, eights.shape[-2], bits)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        made[..., byte] |= (eights[..., i] << offset).to(made.dtype)
        if offset + bits > 8:
            made[..., byte + 1] |= (eights[..., i] >> (8 - offset)).to(made.dtype)
    return made.flatten(-2)[..., : size(n, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "*rows b"], bits: int, n: int) -> UInt8[Tensor, "*rows n"]:
    """The first n numbers of each row."""
    if bits == 8:
        return packed[..., :n]
    *rows, _ = packed.shape
    groups = F.pad(packed, (0, -packed.shape[-1] % bits)).view(*rows, -1, bits)
    made = packed.new_empty(*rows, groups.shape[-2], 8)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        number: Int[Tensor, "*rows g"] = groups[..., byte] >> offset
        if offset + bits > 8:
            number = number | groups[..., byte + 1] << (8 - offset)
        made[..., i] = number & (2**bits - 1)
    return made.flatten(-2)[..., :n]
