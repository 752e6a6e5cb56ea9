"""Encode scales and zero points exactly, in the fewest bytes.

The bytes are `uint8` bit patterns, so that no cast of a model's dtype changes them.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.numerics.block_scales import E4M3
from fp4dit.utils.bitpack import pack_bits, packed_size, unpack_bits

Vector = Float[Tensor, "n"]

Bytes = UInt8[Tensor, "b"]

FormatIndices = UInt8[Tensor, "n"]  # for each block, the index of its number format

EncodedParts = Mapping[str, Bytes]  # "" has an entry for each number, other parts are shared

if sys.byteorder != "little":
    raise ImportError(
        "packed weights are read and written in little-endian order, and this machine is big-endian"
    )


@runtime_checkable
class QParamEncoding(Protocol):
    """Encoding of a vector of n numbers, one for each block of a weight.

    `format_index` says which of a weight's formats each block has.

    Example:
        >>> encoding, format_index = UIntEncoding(bits=4), torch.zeros(3, dtype=torch.uint8)
        >>> parts = encoding.encode(torch.tensor([0.0, 7.0, 15.0]), format_index)
        >>> encoding.decode(parts, format_index)
        tensor([ 0.,  7., 15.])
    """

    def encode(self, x: Vector, format_index: FormatIndices) -> EncodedParts | None:
        """Return the bytes of each part, or None if a number could not be read back exactly."""
        ...

    def decode(self, parts: EncodedParts, format_index: FormatIndices) -> Vector:
        """Return the numbers in fp32."""
        ...

    def part_sizes(self, n: int) -> dict[str, int]:
        """Return the number of bytes of each part for n numbers."""
        ...


@dataclass(frozen=True)
class UIntEncoding:
    """Integers from 0 to 2^bits - 1, packed densely.

    Args:
        bits: The bits of one integer.

    Example:
        >>> UIntEncoding(bits=4).part_sizes(100)
        {'': 50}
    """

    bits: int

    def encode(self, x: Vector, format_index: FormatIndices) -> EncodedParts | None:
        """Return the packed integers, or None if a number is not an integer of `bits` bits."""
        if not x.equal(x.round().clamp(0, 2**self.bits - 1)) or x.signbit().any():
            return None
        return {"": pack_bits(x.to(torch.uint8), self.bits)}

    def decode(self, parts: EncodedParts, format_index: FormatIndices) -> Vector:
        """Return the integers in fp32."""
        return unpack_bits(parts[""], self.bits, len(format_index)).float()

    def part_sizes(self, n: int) -> dict[str, int]:
        """Return the number of bytes of each part for n numbers."""
        return {"": packed_size(n, self.bits)}


@dataclass(frozen=True)
class E8M0Encoding:
    """Powers of two from 2^-127 to 2^127 (E8M0), optionally times one shared fp32 factor.

    A byte is the exponent plus 127. The factor lies in [1, 2).

    Args:
        has_factor: Whether there is a shared factor.

    Example:
        >>> E8M0Encoding(has_factor=True).part_sizes(100)
        {'': 100, 'factor': 4}
    """

    has_factor: bool

    def encode(self, x: Vector, format_index: FormatIndices) -> EncodedParts | None:
        """Return exponents and factor, or None if not all numbers have the same mantissa."""
        mantissa, exponent = torch.frexp(x)
        code, factor = exponent - 1 + 127, 2 * mantissa[:1]
        in_range = (x > 0) & (mantissa == mantissa[0]) & (code >= 0) & (code <= 254)
        are_powers_of_two = bool((mantissa == 0.5).all())
        if not in_range.all() or are_powers_of_two == self.has_factor:
            return None
        parts = {"": code.to(torch.uint8)}
        if self.has_factor:
            parts["factor"] = factor.view(torch.uint8)
        return parts if self.decode(parts, format_index).equal(x) else None

    def decode(self, parts: EncodedParts, format_index: FormatIndices) -> Vector:
        """Return factor * 2^exponent in fp32."""
        exponent = parts[""].int() - 127
        if self.has_factor:
            factor = parts["factor"].view(torch.float32)
        else:
            factor = torch.ones(1, device=exponent.device)
        return torch.ldexp(factor.expand(len(exponent)), exponent)

    def part_sizes(self, n: int) -> dict[str, int]:
        """Return the number of bytes of each part for n numbers."""
        return {"": n, "factor": 4} if self.has_factor else {"": n}


@dataclass(frozen=True)
class E4M3Encoding:
    """Positive FP8 E4M3 numbers times one fp32 factor for each number format.

    These are the two levels of NVFP4's scales.

    Args:
        num_factors: The number of formats.

    Example:
        >>> E4M3Encoding(num_factors=1).part_sizes(100)
        {'': 100, 'factor': 4}
    """

    num_factors: int

    def encode(self, x: Vector, format_index: FormatIndices) -> EncodedParts | None:
        """Return codes and factors, or None if there is no such factor."""
        factors = x.new_zeros(self.num_factors)
        for i in format_index.unique().tolist():
            if i >= self.num_factors:
                return None
            factor = find_common_factor(x[format_index == i].unique())
            if factor is None:
                return None
            factors[i] = factor
        codes = E4M3.nearest(x / factors[format_index.int()]).to(torch.float8_e4m3fn)
        return {"": codes.view(torch.uint8), "factor": factors.view(torch.uint8)}

    def decode(self, parts: EncodedParts, format_index: FormatIndices) -> Vector:
        """Return each E4M3 number times the factor of its block's format, in fp32."""
        numbers = parts[""].view(torch.float8_e4m3fn).float()
        factors = parts["factor"].view(torch.float32)
        return numbers * (factors if self.num_factors == 1 else factors[format_index.int()])

    def part_sizes(self, n: int) -> dict[str, int]:
        """Return the number of bytes of each part for n numbers."""
        return {"": n, "factor": 4 * self.num_factors}


@dataclass(frozen=True)
class SignedE4M3Encoding(E4M3Encoding):
    """`E4M3Encoding` for two formats, whose sign bit says which format the block has.

    It is the scale of IF4 (arXiv:2603.28765), E2M1 or INT4 by block: the sign bit of a block of the
    second format is 1, and the magnitude of the number is the scale.

    Example:
        >>> encoding, format_index = SignedE4M3Encoding(), torch.tensor([0, 1], dtype=torch.uint8)
        >>> parts = encoding.encode(torch.tensor([448.0, 448.0]), format_index)
        >>> parts[""].view(torch.float8_e4m3fn).float()
        tensor([ 448., -448.])
    """

    num_factors: int = 2

    def __post_init__(self) -> None:
        if self.num_factors != 2:
            raise ValueError(f"a sign bit says which of 2 formats, not of {self.num_factors}")

    def encode(self, x: Vector, format_index: FormatIndices) -> EncodedParts | None:
        """Return codes with the format in their sign bits, and factors, or None if none fit."""
        parts = super().encode(x, format_index)
        return parts and {**parts, "": parts[""] | format_index << 7}

    def decode(self, parts: EncodedParts, format_index: FormatIndices) -> Vector:
        """Return the magnitude of each E4M3 number times the factor of its block's format."""
        return super().decode({**parts, "": parts[""] & 127}, format_index)


def find_common_factor(x: Vector) -> Float[Tensor, ""] | None:
    """Return a factor f so that each number is fp32(f * e) for an E4M3 number e, or None.

    Args:
        x: Ascending numbers without repetition.
    """
    factors = list_common_factors(x)
    return factors[0] if len(factors) else None


def list_common_factors(x: Vector) -> Float[Tensor, "m"]:
    """Return all factors f so that each number is fp32(f * e) for an E4M3 number e.

    The largest number is f times one of 126 E4M3 numbers. The quotient by each of these and its two
    neighbours in fp32 are tried.

    Args:
        x: Ascending numbers without repetition.
    """
    if len(x) > 126 or not x[0] > 0:
        return x[:0]
    codes = E4M3.values().flip(0)
    quotient = x[-1] / codes[codes > 0]
    factors = add_neighbours(quotient)
    numbers = E4M3.nearest(x / factors)
    fits = ((numbers * factors == x) & (numbers > 0)).all(1)
    return factors[fits][:, 0]


def add_neighbours(quotient: Vector) -> Float[Tensor, "m 1"]:
    """Return a column of each positive quotient and, since it is rounded, its two neighbours."""
    neighbours = [quotient.nextafter(quotient * 0), quotient, quotient.nextafter(quotient * 2)]
    return torch.stack(neighbours, 1).view(-1, 1)


@dataclass(frozen=True)
class FloatEncoding:
    """IEEE floats of 2 or 4 bytes, little-endian.

    Args:
        num_bytes: The bytes of one number, 2 or 4.

    Example:
        >>> FloatEncoding(num_bytes=2).part_sizes(100)
        {'': 200}
    """

    num_bytes: int

    def encode(self, x: Vector, format_index: FormatIndices) -> EncodedParts | None:
        """Return the floats, or None if the cast changes one."""
        cast = x.to(self.dtype)
        return {"": cast.view(torch.uint8)} if cast.float().equal(x) else None

    def decode(self, parts: EncodedParts, format_index: FormatIndices) -> Vector:
        """Return the floats in fp32."""
        return parts[""].contiguous().view(self.dtype).float()

    def part_sizes(self, n: int) -> dict[str, int]:
        """Return the number of bytes of each part for n numbers."""
        return {"": self.num_bytes * n}

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the floats."""
        return {2: torch.float16, 4: torch.float32}[self.num_bytes]


def smallest_encoding(
    x: Vector, format_index: FormatIndices, num_formats: int
) -> tuple[QParamEncoding, EncodedParts]:
    """Return the encoding that holds `x` exactly in the fewest bytes, and the bytes.

    Of several encodings of the same size the first in the list below is taken.
    """
    encodings: list[QParamEncoding] = [
        UIntEncoding(1),
        UIntEncoding(2),
        UIntEncoding(4),
        UIntEncoding(8),
        E8M0Encoding(False),
        E8M0Encoding(True),
        SignedE4M3Encoding() if num_formats == 2 else E4M3Encoding(num_formats),
        FloatEncoding(2),
        FloatEncoding(4),
    ]
    encodings.sort(key=lambda encoding: sum(encoding.part_sizes(len(x)).values()))
    for encoding in encodings:
        parts = encoding.encode(x, format_index)
        if parts is not None:
            return encoding, parts
    raise ValueError("a scale or zero point is not a finite number of fp32")
