"""Low-rank branches that are fitted to the weight alone, with factors in 16 bits or in few.

A weight W is approximated by L + R, with L of low rank and R quantized. Both are fitted in turn, R
to Q(W - L) and L to W - R. This needs no inputs, unlike `fp4dit.transforms.low_rank`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.formats import fp16, integer
from fp4dit.numerics.quantizer import PerRow, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.transforms.base import Transform, WeightMatrix, apply_in_fp32
from fp4dit.transforms.low_rank import LowRankBranch, choose_rank, factor_low_rank
from fp4dit.utils.bitpack import pack_bits, packed_size, unpack_bits

Factors = tuple[Float[Tensor, "o r"], Float[Tensor, "r k"]]

FACTOR_ROUNDS = 4  # least-squares fits of one quantized factor to the other


def refine_low_rank(
    weight: WeightMatrix,
    iterations: int,
    approximate: Callable[[WeightMatrix], Factors],
    quantizer: Quantizer,
) -> Factors:
    """Return the factors of the branch with the least error of the weight.

    Args:
        weight: The weight W.
        iterations: Largest number of approximations. They end when the error ||W - L - R||
            no longer falls.
        approximate: Returns the factors of a matrix of low rank near to a given matrix.
        quantizer: Quantizer of the rest of the weight.
    """
    best, least_error = approximate(weight), float("inf")
    up, down = best
    for _ in range(iterations):
        residual = weight - up @ down
        residual_hat = quantizer(residual)
        error = (residual - residual_hat).square().sum(dtype=torch.float64).item()
        if error >= least_error:
            break
        best, least_error = (up, down), error
        up, down = approximate(weight - residual_hat)
    return best


class RefinedLowRankBranch(LowRankBranch):
    """`LowRankBranch` that is fitted to the weight alone.

    Example:
        >>> branch = RefinedLowRankBranch(out=32, k=64, rank=2, iterations=5)
        >>> branch.fit_weight(weight, quantizer)
    """

    fit = Transform.fit  # no inputs are needed

    @torch.no_grad()
    def fit_weight(self, weight: WeightMatrix, quantizer: Quantizer) -> None:
        def approximate(target: WeightMatrix) -> Factors:
            up, down = factor_low_rank(target, self.rank)
            return up.to(self.up.dtype).float(), down.to(self.down.dtype).float()

        up, down = refine_low_rank(weight.float(), self.iterations, approximate, quantizer)
        self.up.copy_(up)
        self.down.copy_(down)


class QuantizedLowRankBranch(Transform):
    """Low-rank branch with factors in integers of few bits (LoRaQ, arXiv:2604.18117).

    Each row of the two factors has a scale in fp16. The branch computes
    Q(Q(x) down^T) up^T, where Q quantizes each token; without `input_bits` it keeps x W^T.

    Args:
        out: Number of output channels.
        k: Number of input channels.
        rank: Rank of the branch.
        iterations: Largest number of approximations of W minus the quantized rest.
        bits: Bits of the factors, 2 to 8.
        input_bits: Bits of what the factors are multiplied by; None for 16.

    Example:
        >>> branch = QuantizedLowRankBranch(32, 64, rank=2, iterations=5, bits=8, input_bits=8)
        >>> branch.fit_weight(weight, quantizer)
        >>> branch.storage_bits()
        2560.0
    """

    down_codes: UInt8[Tensor, "r b"]
    down_scale: Float[Tensor, "r 1"]
    up_codes: UInt8[Tensor, "o c"]
    up_scale: Float[Tensor, "o 1"]

    def __init__(
        self, out: int, k: int, rank: int, iterations: int, bits: int, input_bits: int | None
    ) -> None:
        super().__init__()
        self.rank, self.iterations, self.bits, self.k = rank, iterations, bits, k
        self.input_quantizer = Quantizer(integer(input_bits), PerToken()) if input_bits else None
        for name, rows, columns in (("down", rank, k), ("up", out, rank)):
            codes = torch.zeros(rows, packed_size(columns, bits), dtype=torch.uint8)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", torch.zeros(rows, 1, dtype=torch.float16))

    @property
    def factors(self) -> Factors:
        """The factors up and down, in fp32."""
        up = decode_integers(self.up_codes, self.up_scale, self.bits, self.rank)
        return up, decode_integers(self.down_codes, self.down_scale, self.bits, self.k)

    @torch.no_grad()
    def fit_weight(self, weight: WeightMatrix, quantizer: Quantizer) -> None:
        quantize = Quantizer(integer(self.bits), PerRow(), AbsMax(fp16))

        def approximate(target: WeightMatrix) -> Factors:
            return fit_quantized_factors(target, self.rank, quantize)

        up, down = refine_low_rank(weight.float(), self.iterations, approximate, quantizer)
        for name, factor in (("up", up), ("down", down)):
            codes, scale = encode_integers(factor, self.bits)
            getattr(self, f"{name}_codes").copy_(codes)
            getattr(self, f"{name}_scale").copy_(scale)

    def transform_weight(self, w: WeightMatrix) -> WeightMatrix:
        up, down = self.factors
        return apply_in_fp32(lambda w: w - up.to(w.dtype) @ down.to(w.dtype), w)

    def compute_bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        up, down = self.factors

        def multiply(x: Tensor, factor: Tensor) -> Tensor:
            x = x if self.input_quantizer is None else self.input_quantizer(x)
            return F.linear(x, factor.to(x.dtype))

        return apply_in_fp32(lambda x: multiply(multiply(x, down), up), x)


def fit_quantized_factors(target: WeightMatrix, rank: int, quantize: Quantizer) -> Factors:
    """Return quantized factors whose product is near to `target`.

    The factors of the nearest matrix of this rank are scaled to equal sizes. Then each factor in
    turn is the quantized least-squares solution for the other one, quantized, so that it makes up
    for the errors of the other; the pair with the least error is kept.
    """
    up, down = factor_low_rank(target, rank)
    size = (down.norm(dim=1) / up.norm(dim=0)).clamp(min=1e-30).sqrt()
    down = quantize((down / size[:, None]).float()).double()
    goal, least_error = target.double(), float("inf")
    best = up.float(), down.float()
    for _ in range(FACTOR_ROUNDS):
        up = quantize((goal @ down.mT @ invert_gram(down)).float()).double()
        error = (goal - up @ down).square().sum().item()
        if error < least_error:
            least_error, best = error, (up.float(), down.float())
        down = quantize((invert_gram(up.mT) @ up.mT @ goal).float()).double()
    return best


def invert_gram(rows: Float[Tensor, "r n"]) -> Float[Tensor, "r r"]:
    """Return the pseudoinverse of the products of all pairs of rows."""
    return torch.linalg.pinv(rows @ rows.mT, hermitian=True)


def encode_integers(
    x: Float[Tensor, "n m"], bits: int
) -> tuple[UInt8[Tensor, "n b"], Float[Tensor, "n 1"]]:
    """Return the packed codes and the fp16 scale of each row of a matrix."""
    scale = Quantizer(integer(bits), PerRow(), AbsMax(fp16)).compute_qparams(x)
    codes = integer(bits).nearest(scale.to_grid(x)) + 2 ** (bits - 1)
    return pack_bits(codes.to(torch.uint8), bits), scale.unit(x).half()


def decode_integers(
    codes: UInt8[Tensor, "n b"], scale: Float[Tensor, "n 1"], bits: int, columns: int
) -> Float[Tensor, "n m"]:
    """Return the matrix that `encode_integers` encoded, in fp32."""
    return (unpack_bits(codes, bits, columns).float() - 2 ** (bits - 1)) * scale.float()


@dataclass(frozen=True)
class RefinedLowRank:
    """Low-rank branch in fp16 that is fitted to the weight alone.

    R = Q(W - L) and L = svd_r(W - R) alternate, as in cache-dit's refinement of SVDQuant. No
    calibration data is needed. The branch with the least error of the weight is kept.

    Args:
        rank: Rank of the branch; None for K / 32, where K is the number of input channels.
        iterations: Largest number of decompositions.

    Example:
        >>> RefinedLowRank()(out=32, k=64).rank
        2
    """

    needs_inputs: ClassVar[bool] = False

    rank: int | None = None
    iterations: int = 6

    def __call__(self, out: int, k: int) -> RefinedLowRankBranch:
        rank = choose_rank(self.rank, out, k, self.iterations)
        return RefinedLowRankBranch(out, k, rank, self.iterations)


@dataclass(frozen=True)
class QuantizedLowRank:
    """Low-rank branch in few bits that is fitted to the weight alone (LoRaQ, arXiv:2604.18117).

    It is a reconstruction from the abstract.

    Args:
        rank: Rank of the branch; None for K / 32, where K is the number of input channels.
        iterations: Largest number of approximations of W minus the quantized rest.
        bits: Bits of the factors, 2 to 8.
        input_bits: Bits of what the factors are multiplied by, 2 to 8; None for 16.

    Example:
        >>> QuantizedLowRank(bits=4)(out=32, k=64).storage_bits()  # 4 * 2 * 96 + 16 * 34
        1312.0
    """

    needs_inputs: ClassVar[bool] = False

    rank: int | None = None
    iterations: int = 6
    bits: int = 8
    input_bits: int | None = 8

    def __call__(self, out: int, k: int) -> QuantizedLowRankBranch:
        rank = choose_rank(self.rank, out, k, self.iterations)
        if not all(2 <= bits <= 8 for bits in (self.bits, self.input_bits or 8)):
            raise ValueError(
                f"a branch has integers of 2 to 8 bits, not bits={self.bits} and "
                f"input_bits={self.input_bits}."
            )
        return QuantizedLowRankBranch(out, k, rank, self.iterations, self.bits, self.input_bits)
