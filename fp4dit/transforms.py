"""Pre-transforms: pairs of maps on a linear layer's input and weight that cancel in x W^T, but not in what rounding
makes of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.quantizer import Quantizer
from fp4dit.verbatim import Verbatim

Weight = Float[Tensor, "o k"]
Sample = Float[Tensor, "n t k"]  # n calls of t tokens
Fake = Callable[[Tensor], Tensor]  # quantizes and dequantizes


class Transform(Verbatim):
    """`activation(x) weight(W)^T + bypass(x)` = x W^T. Does nothing until it is fitted, if it has to be.

    In a chain each takes what the one before made of x and of W; the bypasses add up.
    """

    def fit(self, weight: Weight, x: Sample, quantizer: Quantizer, activation: Fake) -> None:
        """Adapt to a weight and a sample of the layer's inputs, both as they come out of the chain so far.

        `quantizer` is the weight's; `activation` fake-quantizes x, or returns it.
        """

    def activation(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return x

    def weight(self, w: Weight) -> Weight:
        return w

    def bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"] | None:
        """What the layer's output gets added in high precision; x as it enters this transform."""
        return None

    def bits(self) -> float:
        """Storage of what it keeps, in total."""
        return 16.0 * sum(buffer.numel() for buffer in self.state_dict().values())


@runtime_checkable
class TransformSpec(Protocol):
    """Makes a transform, not yet fitted, for a weight of this shape."""

    def __call__(self, out: int, k: int) -> Transform:
        """
        Raises:
            ValueError: if there is none for this shape.
        """
        ...


def precisely(f: Callable[[Tensor], Tensor], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`f(x)` in at least fp32, also under autocast, then in x's own dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return f(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def output_error(x: Sample, weight: Weight, x_hat: Sample, weight_hat: Weight) -> float:
    """Sum of squares of what quantization does to the layer's output."""
    return (F.linear(x, weight) - F.linear(x_hat, weight_hat)).square().sum(dtype=torch.float64).item()


@runtime_checkable
class ChannelStatistic(Protocol):
    """How large each input channel is: one number per channel, not negative."""

    def __call__(self, x: Sample, weight: Weight) -> Float[Tensor, "k"]: ...


@dataclass(frozen=True)
class ChannelMax:
    """The largest magnitude in the whole sample."""

    def __call__(self, x: Sample, weight: Weight) -> Float[Tensor, "k"]:
        return x.abs().amax((0, 1))


@dataclass(frozen=True)
class MovingMax:
    """Moving average of the calls' maxima, in their order, which starts at the first (arXiv:2406.02540, its code)."""

    momentum: float = 0.95

    def __call__(self, x: Sample, weight: Weight) -> Float[Tensor, "k"]:
        average, *rest = x.abs().amax(1)
        for largest in rest:
            average = torch.lerp(largest, average, self.momentum)
        return average


@dataclass(frozen=True)
class Salience:
    """Mean of the calls' maxima m_b, weighted by softmax_b(-rho(m_b, w)): calls whose large channels are not the
    weight's count more. rho is Spearman's, w the weight's maxima (arXiv:2405.16005)."""

    def __call__(self, x: Sample, weight: Weight) -> Float[Tensor, "k"]:
        maxima, w = x.abs().amax(1), weight.abs().amax(0)
        rho = torch.stack([spearman(m, w) for m in maxima])
        return (-rho).softmax(0).to(maxima.dtype) @ maxima


def spearman(a: Float[Tensor, "k"], b: Float[Tensor, "k"]) -> Float[Tensor, ""]:
    """Correlation of ranks, ties sharing their mean rank; 0 where one side is constant."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].nan_to_num(0.0)


def ranks(x: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]


def divisors(x: Float[Tensor, "k"], w: Float[Tensor, "k"], a: float, b: float) -> Float[Tensor, "k"]:
    """x^a / w^b as kept in fp16; 1 for a channel that is always 0, or that the weight ignores."""
    s = (x.float().pow(a) / w.float().pow(b)).clamp(1e-5, torch.finfo(torch.float16).max)
    return s.masked_fill((x == 0) | (w == 0), 1.0).half()


@runtime_checkable
class Choice(Protocol):
    """Chooses what each input channel is divided by."""

    def __call__(self, weight: Weight, x: Sample, quantizer: Quantizer, activation: Fake) -> Float[Tensor, "k"]: ...


class Division(Transform):
    """x / s and W s, channel by channel: moves the spread of the channels from one to the other."""

    divisor: Float[Tensor, "k"]

    def __init__(self, k: int, choice: Choice) -> None:
        super().__init__()
        self.choice = choice
        self.register_buffer("divisor", torch.ones(k, dtype=torch.float16))

    @torch.no_grad()
    def fit(self, weight: Weight, x: Sample, quantizer: Quantizer, activation: Fake) -> None:
        self.divisor.copy_(self.choice(weight.float(), x.float(), quantizer, activation))

    def activation(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return precisely(lambda x: x / self.divisor, x)

    def weight(self, w: Weight) -> Weight:
        return precisely(lambda w: w * self.divisor, w)


@dataclass(frozen=True)
class Balance:
    """s = x^alpha / w^(1 - alpha), of each channel's size `of` the inputs and its maximum in the weight
    (arXiv:2211.10438). At least 1e-5."""

    alpha: float = 0.5
    of: ChannelStatistic = field(default_factory=ChannelMax)

    def __call__(self, out: int, k: int) -> Division:
        return Division(k, self.choose)

    def choose(self, weight: Weight, x: Sample, quantizer: Quantizer, activation: Fake) -> Float[Tensor, "k"]:
        return divisors(self.of(x, weight), weight.abs().amax(0), self.alpha, 1 - self.alpha)


@dataclass(frozen=True)
class BalanceSearch:
    """s = x^a / w^b with the least error of the quantized layer's output, over (0, 0), which is no balance, and
    (i / steps, 0) and (i / steps, 1 - i / steps) for i = 1 to `steps` (arXiv:2411.05007, its code)."""

    steps: int = 20
    of: ChannelStatistic = field(default_factory=ChannelMax)

    def __call__(self, out: int, k: int) -> Division:
        return Division(k, self.choose)

    def powers(self) -> list[tuple[float, float]]:
        grid = [i / self.steps for i in range(1, self.steps + 1)]
        return [(0.0, 0.0), *((a, 0.0) for a in grid), *((a, 1 - a) for a in grid[:-1])]

    def choose(self, weight: Weight, x: Sample, quantizer: Quantizer, activation: Fake) -> Float[Tensor, "k"]:
        sizes = self.of(x, weight), weight.abs().amax(0)

        def error(s: Tensor) -> float:
            return output_error(x, weight, activation(x / s), quantizer(weight * s))

        return min((divisors(*sizes, a, b) for a, b in self.powers()), key=error)


class Branch(Transform):
    """W - up down is left to be quantized; x down^T up^T is computed beside it, in 16 bits, on the unquantized x."""

    down: Float[Tensor, "r k"]
    up: Float[Tensor, "o r"]

    def __init__(self, out: int, k: int, rank: int, iterations: int) -> None:
        super().__init__()
        self.rank, self.iterations = rank, iterations
        self.register_buffer("down", torch.zeros(rank, k, dtype=torch.float16))
        self.register_buffer("up", torch.zeros(out, rank, dtype=torch.float16))

    @torch.no_grad()
    def fit(self, weight: Weight, x: Sample, quantizer: Quantizer, activation: Fake) -> None:
        weight, x = weight.float(), x.float()
        x_hat, rounded, least = activation(x), torch.zeros_like(weight), float("inf")
        for _ in range(self.iterations):
            up, down = (factor.half() for factor in low_rank(weight - rounded, self.rank))
            rest = weight - up.float() @ down.float()
            rounded = quantizer(rest)
            error = output_error(x, rest, x_hat, rounded)
            if error >= least:
                break
            least = error
            self.up.copy_(up)
            self.down.copy_(down)

    def weight(self, w: Weight) -> Weight:
        return precisely(lambda w: w - self.up.to(w.dtype) @ self.down.to(w.dtype), w)

    def bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        return precisely(lambda x: F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)), x)


def low_rank(weight: Weight, rank: int) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r k"]]:
    """The nearest matrix of this rank, as a product: singular vectors of the shorter side, and W seen through them.

    From the eigenvectors of W W^T in fp64, many times faster than from all singular vectors of W.
    """
    if len(weight) > weight.shape[1]:
        up, down = low_rank(weight.mT, rank)
        return down.mT, up.mT
    exact = weight.double()
    up = torch.linalg.eigh(exact @ exact.mT).eigenvectors[:, -rank:]
    return up, up.mT @ exact


@dataclass(frozen=True)
class LowRank:
    """A branch for the largest singular directions (arXiv:2411.05007), K / 32 of them unless `rank` says how many.

    Each iteration takes them of W - Q(rest of the one before), until the error of the layer's output no longer falls;
    the best is kept.
    """

    rank: int | None = None
    iterations: int = 1

    def __call__(self, out: int, k: int) -> Branch:
        rank = max(1, k // 32) if self.rank is None else self.rank
        if rank < 1 or self.iterations < 1:
            raise ValueError(
                f"a low-rank branch of rank {rank} after {self.iterations} iterations keeps nothing: "
                "give both at least 1, or leave it out."
            )
        return Branch(out, k, min(rank, out, k), self.iterations)
