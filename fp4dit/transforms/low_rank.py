"""A 16-bit low-rank branch beside a quantized layer (SVDQuant, arXiv:2411.05007)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.transforms.base import (
    FakeQuantizeFn,
    InputSample,
    Transform,
    WeightMatrix,
    apply_in_fp32,
    squared_output_error,
)


class LowRankBranch(Transform):
    """Low-rank branch beside the quantized layer (SVDQuant, arXiv:2411.05007).

    The quantized layer holds Q(W - up down) instead of Q(W). The branch computes x down^T up^T from
    the unquantized input, with factors in 16 bits, and is added to the output.

    Args:
        out: Number of output channels.
        k: Number of input channels.
        rank: Rank of the branch.
        iterations: Largest number of decompositions. Each decomposes W minus the quantized residual
            of the one before.
        dtype: Dtype of the factors.

    Example:
        >>> branch = LowRankBranch(out=32, k=64, rank=2, iterations=1)
        >>> branch.fit(weight, x, quantizer, fake_quantize_input)
        >>> correction = branch.compute_bypass(x)
    """

    down: Float[Tensor, "r k"]
    up: Float[Tensor, "o r"]

    def __init__(
        self, out: int, k: int, rank: int, iterations: int, dtype: torch.dtype = torch.float16
    ) -> None:
        super().__init__()
        self.rank, self.iterations = rank, iterations
        self.register_buffer("down", torch.zeros(rank, k, dtype=dtype))
        self.register_buffer("up", torch.zeros(out, rank, dtype=dtype))

    @torch.no_grad()
    def fit(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> None:
        weight, x = weight.float(), x.float()
        x_hat = fake_quantize_input(x)
        residual_hat, least_error = torch.zeros_like(weight), float("inf")
        for _ in range(self.iterations):
            up, down = factor_low_rank(weight - residual_hat, self.rank)
            up, down = up.to(self.up.dtype), down.to(self.down.dtype)
            residual = weight - up.float() @ down.float()
            residual_hat = quantizer(residual)
            error = squared_output_error(x, residual, x_hat, residual_hat)
            if error >= least_error:
                break
            least_error = error
            self.up.copy_(up)
            self.down.copy_(down)

    def transform_weight(self, w: WeightMatrix) -> WeightMatrix:
        return apply_in_fp32(lambda w: w - self.up.to(w.dtype) @ self.down.to(w.dtype), w)

    def compute_bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        def compute_branch(x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

        return apply_in_fp32(compute_branch, x)


def factor_low_rank(
    weight: WeightMatrix, rank: int
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r k"]]:
    """Return the factors of the nearest matrix of this rank, up and down.

    If W has fewer rows than columns, `up` holds the eigenvectors of W W^T with the largest
    eigenvalues, which are left singular vectors of W, and `down` is up^T W. Otherwise the sides are
    swapped. In fp64 this is much faster than a full SVD of W.
    """
    if len(weight) > weight.shape[1]:
        up, down = factor_low_rank(weight.mT, rank)
        return down.mT, up.mT
    weight_fp64 = weight.double()
    up = torch.linalg.eigh(weight_fp64 @ weight_fp64.mT).eigenvectors[:, -rank:]
    return up, up.mT @ weight_fp64


def choose_rank(rank: int | None, out: int, k: int, iterations: int) -> int:
    """Return the rank of a branch beside a weight; None asks for K / 32.

    Raises:
        ValueError: if nothing would be kept.
    """
    rank = max(1, k // 32) if rank is None else rank
    if rank < 1 or iterations < 1:
        raise ValueError(
            f"a low-rank branch of rank {rank} after {iterations} iterations keeps nothing: give "
            "both at least 1, or leave it out."
        )
    return min(rank, out, k)


@dataclass(frozen=True)
class LowRank:
    """Low-rank branch of the largest singular directions (SVDQuant, arXiv:2411.05007).

    Each iteration decomposes W - Q(R), where R is what the branch of the previous iteration leaves
    of W. The iterations end when the error of the layer's output no longer falls, and the best
    branch is kept.

    Args:
        rank: Rank of the branch; None for K / 32, where K is the number of input channels.
        iterations: Largest number of decompositions.

    Example:
        >>> branch = LowRank(iterations=100)(out=32, k=64)
        >>> branch.rank
        2
    """

    dtype: ClassVar[torch.dtype] = torch.float16  # of the factors

    rank: int | None = None
    iterations: int = 1

    def __call__(self, out: int, k: int) -> LowRankBranch:
        rank = choose_rank(self.rank, out, k, self.iterations)
        return LowRankBranch(out, k, rank, self.iterations, self.dtype)

    def subtract_from(self, weight: WeightMatrix) -> WeightMatrix:
        """Return what a branch of the weight's largest singular directions leaves of it."""
        out, k = weight.shape
        rank = choose_rank(self.rank, out, k, self.iterations)
        up, down = factor_low_rank(weight, rank)
        return weight - up.to(self.dtype).float() @ down.to(self.dtype).float()


@dataclass(frozen=True)
class LowRankBF16(LowRank):
    """`LowRank` of a fixed rank with factors in bf16, which Nunchaku holds exactly.

    Args:
        rank: Rank of the branch; None for K / 32, where K is the number of input channels.
        iterations: Largest number of decompositions.

    Example:
        >>> LowRankBF16()(out=128, k=128).down.dtype
        torch.bfloat16
    """

    dtype: ClassVar[torch.dtype] = torch.bfloat16

    rank: int | None = 32
