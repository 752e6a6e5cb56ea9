"""Hadamard rotations, which spread outliers over many channels (QuaRot, arXiv:2404.00456).

A rotation multiplies the input by one or two small matrices, which costs little compared with the
layer's own matmul.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from fp4dit.transforms.base import Transform, apply_in_fp32

PALEY_PRIMES = {12: 11, 20: 19, 28: 13, 36: 17, 44: 43}  # the prime that each order is built from

ORDERS = ", ".join(map(str, PALEY_PRIMES))

Square = Int8[Tensor, "n n"]

Left = Int8[Tensor, "a a"]

Right = Int8[Tensor, "b b"]


def factor_paley_orders(n: int) -> tuple[int, ...] | None:
    """Return the Paley orders whose product is n up to a power of two, the largest first.

    Returns:
        The orders, none for a power of two, or None if n has no such factorization.
    """
    if n <= 0:
        return None
    if n & (n - 1) == 0:
        return ()
    for order in sorted(PALEY_PRIMES, reverse=True):
        if n % order == 0:
            others = factor_paley_orders(n // order)
            if others is not None:
                return order, *others
    return None


def has_hadamard_matrix(n: int) -> bool:
    """Return whether a Hadamard matrix of order n can be built here.

    It can if n is 2^j times any product of 12, 20, 28, 36 and 44.
    """
    return factor_paley_orders(n) is not None


def sylvester_matrix(n: int) -> Square:
    """Return Sylvester's Hadamard matrix of order n, a power of two."""
    h = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def paley_matrix(q: int) -> Square:
    """Return Paley's Hadamard matrix of a prime q (Paley, 1933).

    The order is q + 1 if q = 3 mod 4, and 2 (q + 1) if q = 1 mod 4.
    """
    squares = {i * i % q for i in range(1, q)}
    # The quadratic character of each residue: 0 for 0, 1 for squares, and -1 for all others.
    character = torch.tensor(
        [0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8, device="cpu"
    )
    index = torch.arange(q, device="cpu")
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    conference[0, 0] = 0
    conference[1:, 1:] = character[(index[:, None] - index) % q]
    identity = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    if q % 4 == 3:
        conference[1:, 0] = -1
        return conference + identity
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(conference, sylvester_matrix(2)) + torch.kron(identity, diagonal)


def hadamard_factors(n: int) -> tuple[Left, Right]:
    """Return two matrices whose Kronecker product is `hadamard_matrix(n)`.

    They are of similar size. Up to n = 128 the left one is 1 x 1, because one product with
    a small matrix is faster than two.

    Raises:
        ValueError: If no Hadamard matrix of order n is known here.
    """
    orders = factor_paley_orders(n)
    if orders is None:
        raise ValueError(
            f"no Hadamard matrix of order {n} is known here: give 2^j times any product of "
            f"{ORDERS}."
        )
    power_of_two = n // math.prod(orders)
    first, *others = [paley_matrix(PALEY_PRIMES[order]) for order in orders] or [
        sylvester_matrix(1)
    ]
    if n <= 128:
        return sylvester_matrix(1), torch.kron(first, sylvester_matrix(power_of_two))
    second = reduce(torch.kron, others, sylvester_matrix(1))

    def sum_of_orders(right_power: int) -> int:
        return len(second) * right_power + n // (len(second) * right_power)

    # The power of two that the right matrix takes; the left one takes the rest.
    right_power = min((2**j for j in range(power_of_two.bit_length())), key=sum_of_orders)
    return (
        torch.kron(first, sylvester_matrix(power_of_two // right_power)),
        torch.kron(second, sylvester_matrix(right_power)),
    )


def hadamard_matrix(n: int) -> Square:
    """Return the Hadamard matrix of order n: entries of 1 and -1, with H H^T = n I.

    It is Sylvester's if n is a power of two.
    """
    return torch.kron(*hadamard_factors(n))


def regular_matrix(n: int) -> Square:
    """Return the regular Hadamard matrix of order n, a power of four.

    All of its rows and columns have the sum sqrt(n). It is a Kronecker power of the one of order 4
    (ConvRot, arXiv:2512.03673, section 3).
    """
    of_order_4 = 1 - 2 * torch.eye(4, dtype=torch.int8, device="cpu").flip(1)
    h = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(h) < n:
        h = torch.kron(h, of_order_4)
    return h


def regular_factors(n: int) -> tuple[Left, Right]:
    """Return two matrices whose Kronecker product is `regular_matrix(n)`.

    As in `hadamard_factors`, up to n = 128 the left one is 1 x 1.
    """
    left = 1 if n <= 128 else 4 ** (n.bit_length() // 4)
    return regular_matrix(left), regular_matrix(n // left)


def rotate_blocks(x: Float[Tensor, "*b k"], left: Left, right: Right) -> Float[Tensor, "*b k"]:
    """Return x H / sqrt(n) for each block of n values, where H = kron(left, right).

    On a CPU two products with small matrices are faster than the fast Hadamard transform: 1.4 ms
    instead of 9.2 ms for 512 rows of 1152 values.
    """
    n = len(left) * len(right)
    blocks = x.unflatten(-1, (x.shape[-1] // n, len(left), len(right))) @ right.to(x.dtype)
    if len(left) > 1:
        blocks = left.mT.to(x.dtype) @ blocks
    return blocks.mul(n**-0.5).flatten(-3)


class BlockRotation(Transform):
    """Rotation of each block of channels, of input and weight, by an orthogonal matrix.

    The buffers are not saved, because the spec determines them.

    Args:
        left: Left factor of a Hadamard matrix H = kron(left, right).
        right: Right factor.

    Example:
        >>> rotation = BlockRotation(*regular_factors(64))
        >>> rotated = rotation.transform_input(torch.randn(8, 128))
    """

    left: Left
    right: Right

    def __init__(self, left: Left, right: Right) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def rotate(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        """Return x H / sqrt(n) for each block of n values, in the dtype of `x`."""
        return rotate_blocks(x, self.left, self.right)

    def transform_input(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return apply_in_fp32(self.rotate, x)

    def transform_weight(self, w: Float[Tensor, "o k"]) -> Float[Tensor, "o k"]:
        return self.transform_input(w)


class HadamardRotation(BlockRotation):
    """Random signs, then a Hadamard rotation of each block of channels, of input and weight.

    Args:
        signs: 1 or -1 for each input channel.
        size: Channels per block.

    Example:
        >>> rotation = HadamardRotation(random_signs(0, 64), size=16)
        >>> rotated = rotation.transform_input(torch.randn(8, 64))
    """

    signs: Int8[Tensor, "k"]

    def __init__(self, signs: Int8[Tensor, "k"], size: int) -> None:
        super().__init__(*hadamard_factors(size))
        self.register_buffer("signs", signs, persistent=False)

    def rotate(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return super().rotate(x * self.signs)


@dataclass(frozen=True)
class Hadamard:
    """Hadamard rotation of the input channels, all at once or in blocks.

    Layers of the same width share their signs.

    Args:
        size: Channels per block; None for all of them.
        seed: Seed of the signs.
        signs: Multiply the channels by random signs first.

    Example:
        >>> rotation = Hadamard(size=32)(out=32, k=64)
    """

    needs_inputs: ClassVar[bool] = False  # a spec without this attribute is fitted to inputs

    size: int | None = None
    seed: int = 0
    signs: bool = True

    def __call__(self, out: int, k: int) -> HadamardRotation:
        size = k if self.size is None else self.size
        if not has_hadamard_matrix(size) or k % size:
            sizes = [n for n in range(2, k + 1) if k % n == 0 and has_hadamard_matrix(n)]
            advice = f"use one of {', '.join(map(str, sizes))}" if sizes else "leave it out"
            raise ValueError(
                f"no Hadamard rotation of size {size} fits rows of {k} values: {advice}."
            )
        signs = random_signs(self.seed, k) if self.signs else torch.ones(k, dtype=torch.int8)
        return HadamardRotation(signs, size)


def random_signs(seed: int, k: int) -> Int8[Tensor, "k"]:
    """Return k random signs, the same on every machine."""
    # torch's CPU generator uses only the lower 32 bits of its seed.
    generator = torch.Generator("cpu").manual_seed((1_000_003 * seed + k) % 2**32)
    return torch.randint(2, (k,), generator=generator, device="cpu", dtype=torch.int8) * 2 - 1


@dataclass(frozen=True)
class RegularHadamard:
    """Rotation of blocks of channels by a regular Hadamard matrix (ConvRot, arXiv:2512.03673).

    Sylvester's matrix has a row of ones, so it gathers channels that are alike in one value, the
    sqrt(n)-fold of each. The rows of a regular matrix have equal sums, so such channels stay as
    they are, and a single outlier is spread as evenly. There are no random signs.

    Args:
        size: Channels per block, a power of four. A layer whose width it does not divide has blocks
            of the largest power of four that does.

    Example:
        >>> RegularHadamard()(out=32, k=1152).transform_input(torch.ones(1, 1152)).unique()
        tensor([1.])
    """

    needs_inputs: ClassVar[bool] = False

    size: int = 256

    def __call__(self, out: int, k: int) -> BlockRotation:
        if not is_power_of_four(self.size) or k % 4:
            raise ValueError(
                f"no regular Hadamard rotation of size {self.size} fits rows of {k} values: the "
                "size is 4, 16, 64, 256 and so on, and 4 has to divide the row."
            )
        size = self.size
        while k % size:
            size //= 4
        return BlockRotation(*regular_factors(size))


def is_power_of_four(n: int) -> bool:
    """Return whether n is 4, 16, 64 and so on."""
    return n >= 4 and n.bit_count() == 1 and n.bit_length() % 2 == 1
