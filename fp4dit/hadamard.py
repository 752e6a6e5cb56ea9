"""Hadamard rotations: they spread outliers over many channels, and cost little more than reading x."""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from fp4dit.transforms import Transform, precisely

PALEY = {12: 11, 20: 19, 28: 13, 36: 17, 44: 43}  # order: the prime it is constructed from
ORDERS = ", ".join(map(str, PALEY))
Square = Int8[Tensor, "n n"]
Left = Int8[Tensor, "a a"]
Right = Int8[Tensor, "b b"]


def roots(n: int) -> tuple[int, ...] | None:
    """The orders from `PALEY`, the largest first, whose product is n but for a power of two; None if there are none."""
    odd = n // (n & -n) if n > 0 else 0
    if odd == 1:
        return ()
    for m in sorted(PALEY, reverse=True):
        if n > 0 and n % m == 0 and (others := roots(n // m)) is not None:
            return m, *others
    return None


def order(n: int) -> bool:
    """Whether a Hadamard matrix of this order is known here: 2^j times a product of 1, 12, 20, 28, 36 and 44."""
    return roots(n) is not None


def sylvester(n: int) -> Square:
    """Order n = 2^j."""
    h = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def paley(q: int) -> Square:
    """Order q + 1 from a prime q = 3 mod 4, order 2 (q + 1) from a prime q = 1 mod 4 (Paley, 1933)."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8, device="cpu")
    index = torch.arange(q, device="cpu")
    c = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    c[0, 0] = 0
    c[1:, 1:] = character[(index[:, None] - index) % q]
    one = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    if q % 4 == 3:
        c[1:, 0] = -1
        return c + one
    two = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(c, sylvester(2)) + torch.kron(one, two)


def factors(n: int) -> tuple[Left, Right]:
    """Two matrices whose Kronecker product is `matrix(n)`: of about the same size, or, up to 128, one and all of it.

    Raises:
        ValueError: if no such matrix is known here.
    """
    found = roots(n)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here: give 2^j times any product of {ORDERS}.")
    twos = n // math.prod(found)
    first, *others = [paley(PALEY[m]) for m in found] or [sylvester(1)]
    if n <= 128:
        return sylvester(1), torch.kron(first, sylvester(twos))
    second = reduce(torch.kron, others, sylvester(1))
    right = min((2**j for j in range(twos.bit_length())), key=lambda r: len(second) * r + n // (len(second) * r))
    return torch.kron(first, sylvester(twos // right)), torch.kron(second, sylvester(right))


def matrix(n: int) -> Square:
    """The Hadamard matrix of order n, of 1 and -1: H H^T = n. Sylvester's where n is a power of two."""
    return torch.kron(*factors(n))


def rotate(x: Float[Tensor, "*b k"], left: Left, right: Right) -> Float[Tensor, "*b k"]:
    """x H / sqrt(n), on every n values of a row, for H the Kronecker product of the two.

    Two products with small matrices are faster on a CPU than butterflies: 1.4 against 9.2 ms for 512 rows of 1152.
    """
    n = len(left) * len(right)
    blocks = x.unflatten(-1, (x.shape[-1] // n, len(left), len(right))) @ right.to(x.dtype)
    if len(left) > 1:
        blocks = left.mT.to(x.dtype) @ blocks
    return blocks.mul(n**-0.5).flatten(-3)


class Rotation(Transform):
    """Random signs, then a Hadamard matrix, block by block, on both sides. Nothing of it is saved: a seed makes it."""

    signs: Int8[Tensor, "k"]
    left: Left
    right: Right

    def __init__(self, signs: Int8[Tensor, "k"], size: int) -> None:
        super().__init__()
        left, right = factors(size)
        for name, value in (("signs", signs), ("left", left), ("right", right)):
            self.register_buffer(name, value, persistent=False)

    def activation(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return precisely(lambda x: rotate(x * self.signs, self.left, self.right), x)

    def weight(self, w: Float[Tensor, "o k"]) -> Float[Tensor, "o k"]:
        return self.activation(w)


@dataclass(frozen=True)
class Hadamard:
    """Rotates blocks of `size` channels, or all at once. Layers of one width share their signs."""

    size: int | None = None
    seed: int = 0
    signs: bool = True

    def __call__(self, out: int, k: int) -> Rotation:
        size = k if self.size is None else self.size
        if not order(size) or k % size:
            fitting = [n for n in range(2, k + 1) if k % n == 0 and order(n)]
            advice = f"use one of {', '.join(map(str, fitting))}" if fitting else "leave it out"
            raise ValueError(f"no Hadamard rotation of size {size} fits rows of {k} values: {advice}.")
        return Rotation(random_signs(self.seed, k) if self.signs else torch.ones(k, dtype=torch.int8), size)


def random_signs(seed: int, k: int) -> Int8[Tensor, "k"]:
    """The same on every machine. Of its seed, torch's CPU generator uses the lower 32 bits only."""
    generator = torch.Generator("cpu").manual_seed((1_000_003 * seed + k) % 2**32)
    return torch.randint(2, (k,), generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
