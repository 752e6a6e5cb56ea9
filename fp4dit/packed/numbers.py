"""Scales and zero points in the fewest bytes that hold them exactly, as bit patterns that no cast can touch."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.blockscales import E4M3
from fp4dit.packed import bits

Vector = Float[Tensor, "n"]
Bytes = UInt8[Tensor, "b"]
Kind = UInt8[Tensor, "n"]  # which of the formats is that of a number's block
Parts = Mapping[str, Bytes]  # "" holds a number for each, other names what many share

if sys.byteorder != "little":
    raise ImportError("packed weights are read and written in little-endian order, and this machine is big-endian")


@runtime_checkable
class Numbers(Protocol):
    """A way to keep n numbers."""

    def encode(self, x: Vector, kind: Kind) -> Parts | None:
        """None if one of them would be another one when read back."""
        ...

    def decode(self, parts: Parts, kind: Kind) -> Vector: ...
    def sizes(self, n: int) -> dict[str, int]:
        """Bytes of each part."""
        ...


@dataclass(frozen=True)
class Whole:
    """Whole numbers from 0 up, of so many bits."""

    bits: int

    def encode(self, x: Vector, kind: Kind) -> Parts | None:
        fits = x.equal(x.round().clamp(0, 2**self.bits - 1)) and not x.signbit().any()
        return {"": bits.pack(x.to(torch.uint8), self.bits)} if fits else None

    def decode(self, parts: Parts, kind: Kind) -> Vector:
        return bits.unpack(parts[""], self.bits, len(kind)).float()

    def sizes(self, n: int) -> dict[str, int]:
        return {"": bits.size(n, self.bits)}


@dataclass(frozen=True)
class Powers:
    """Powers of two from 2^-127 to 2^127 (E8M0, the exponent with 127 added), times an fp32 `factor` in [1, 2) that
    all share."""

    factor: bool

    def encode(self, x: Vector, kind: Kind) -> Parts | None:
        mantissa, exponent = torch.frexp(x)
        code, factor = exponent - 1 + 127, 2 * mantissa[:1]
        plain = bool((mantissa == 0.5).all())
        if not ((x > 0) & (mantissa == mantissa[0]) & (code >= 0) & (code <= 254)).all() or plain == self.factor:
            return None
        shared = {"factor": factor.view(torch.uint8)} if self.factor else {}
        found = {"": code.to(torch.uint8), **shared}
        return found if self.decode(found, kind).equal(x) else None

    def decode(self, parts: Parts, kind: Kind) -> Vector:
        exponent = parts[""].int() - 127
        factor = parts["factor"].view(torch.float32) if self.factor else torch.ones(1, device=exponent.device)
        return torch.ldexp(factor.expand(len(exponent)), exponent)

    def sizes(self, n: int) -> dict[str, int]:
        return {"": n, **({"factor": 4} if self.factor else {})}


@dataclass(frozen=True)
class Eighths:
    """Positive numbers of FP8 E4M3, times an fp32 factor that all of a kind share: the two levels of NVFP4's scales.

    `factors` is how many kinds there are.
    """

    factors: int

    def encode(self, x: Vector, kind: Kind) -> Parts | None:
        factors = x.new_zeros(self.factors)
        for i in kind.unique().tolist():
            found = common_factor(x[kind == i].unique()) if i < self.factors else None
            if found is None:
                return None
            factors[i] = found
        codes = E4M3.nearest(x / factors[kind.int()]).to(torch.float8_e4m3fn)
        return {"": codes.view(torch.uint8), "factor": factors.view(torch.uint8)}

    def decode(self, parts: Parts, kind: Kind) -> Vector:
        factors = parts["factor"].view(torch.float32)
        return parts[""].view(torch.float8_e4m3fn).float() * (factors if self.factors == 1 else factors[kind.int()])

    def sizes(self, n: int) -> dict[str, int]:
        return {"": n, "factor": 4 * self.factors}


def common_factor(x: Vector) -> Float[Tensor, ""] | None:
    """An f with which these numbers, ascending, are f times numbers of E4M3, as fp32 rounds the products.

    The largest is f times one of 126 numbers: each of them is tried, and the neighbours of the quotient.
    """
    if len(x) > 126 or not x[0] > 0:
        return None
    codes = E4M3.values().flip(0)
    quotient = x[-1] / codes[codes > 0]
    around = [quotient.nextafter(quotient * 0), quotient, quotient.nextafter(quotient * 2)]
    factors = torch.stack(around, 1).view(-1, 1)
    numbers = E4M3.nearest(x / factors)
    fits = ((numbers * factors == x) & (numbers > 0)).all(1)
    return factors[fits][0, 0] if fits.any() else None


@dataclass(frozen=True)
class Floats:
    """IEEE floats of 2 or 4 bytes, little-endian."""

    bytes: int

    def encode(self, x: Vector, kind: Kind) -> Parts | None:
        kept = x.to(self.dtype)
        return {"": kept.view(torch.uint8)} if kept.float().equal(x) else None

    def decode(self, parts: Parts, kind: Kind) -> Vector:
        return parts[""].contiguous().view(self.dtype).float()

    def sizes(self, n: int) -> dict[str, int]:
        return {"": self.bytes * n}

    @property
    def dtype(self) -> torch.dtype:
        return {2: torch.float16, 4: torch.float32}[self.bytes]


def smallest(x: Vector, kind: Kind, kinds: int) -> tuple[Numbers, Parts]:
    """The way that takes the fewest bytes, the first of equals."""
    ways = [*map(Whole, (1, 2, 4, 8)), Powers(False), Powers(True), Eighths(kinds), Floats(2), Floats(4)]
    ways.sort(key=lambda way: sum(way.sizes(len(x)).values()))
    return next((way, parts) for way in ways if (parts := way.encode(x, kind)) is not None)
