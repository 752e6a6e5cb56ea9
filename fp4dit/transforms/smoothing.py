"""Smoothing: factors per input channel that move outliers from the input to the weight.

The input is divided by the factors and the weight multiplied by them, so the product x W^T stays
the same. The rules that choose the factors are those of SmoothQuant (arXiv:2211.10438), SVDQuant
(arXiv:2411.05007), ViDiT-Q (arXiv:2406.02540) and PTQ4DiT (arXiv:2405.16005).
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.transforms.base import (
    FakeQuantizeFn,
    InputSample,
    Transform,
    WeightMatrix,
    apply_in_fp32,
    squared_output_error,
)
from fp4dit.transforms.low_rank import LowRank


@runtime_checkable
class ChannelStatistic(Protocol):
    """Protocol of functions that measure the size of each input channel.

    Example:
        >>> def mean_magnitude(x, weight):
        ...     return x.abs().mean((0, 1))
        >>> smoothing = Smoothing(statistic=mean_magnitude)
    """

    def __call__(self, x: InputSample, weight: WeightMatrix) -> Float[Tensor, "k"]:
        """Return a number per channel, not negative."""
        ...


@dataclass(frozen=True)
class ChannelMax:
    """Largest magnitude of each channel in the whole sample.

    Example:
        >>> ChannelMax()(torch.randn(4, 16, 64), torch.randn(32, 64)).shape
        torch.Size([64])
    """

    def __call__(self, x: InputSample, weight: WeightMatrix) -> Float[Tensor, "k"]:
        return x.abs().amax((0, 1))


@dataclass(frozen=True)
class MovingAverageMax:
    """Moving average of the calls' channel maxima.

    Args:
        momentum: Weight of the average so far. The average starts at the first call.

    Example:
        >>> statistic = MovingAverageMax(momentum=0.99)
        >>> size = statistic(x, weight)
    """

    momentum: float = 0.95

    def __call__(self, x: InputSample, weight: WeightMatrix) -> Float[Tensor, "k"]:
        average, *rest = x.abs().amax(1)
        for largest in rest:
            average = torch.lerp(largest, average, self.momentum)
        return average


@dataclass(frozen=True)
class MovingAverageBatchMax(MovingAverageMax):
    """Moving average of the mean channel maxima of batches, as in ViDiT-Q's code (2406.02540).

    Args:
        momentum: Weight of the average so far. The average starts at the first batch.
        batch: Number of calls whose maxima are averaged first. The last batch may have fewer.

    Example:
        >>> size = MovingAverageBatchMax(momentum=0.95, batch=4)(x, weight)
    """

    batch: int = 4

    def __call__(self, x: InputSample, weight: WeightMatrix) -> Float[Tensor, "k"]:
        means = torch.stack([part.mean(0) for part in x.abs().amax(1).split(self.batch)])
        return super().__call__(means[:, None], weight)


@dataclass(frozen=True)
class SalienceWeightedMax:
    """Mean of the calls' channel maxima, weighted by salience, as in PTQ4DiT (arXiv:2405.16005).

    The maxima m_b of call b are weighted by softmax_b(-rho(m_b, w)), where rho is Spearman's rank
    correlation and w holds the weight's channel maxima. A call has a larger weight in the mean if
    its large channels differ from the large channels of the weight.

    Example:
        >>> size = SalienceWeightedMax()(x, weight)
    """

    def __call__(self, x: InputSample, weight: WeightMatrix) -> Float[Tensor, "k"]:
        maxima, w = x.abs().amax(1), weight.abs().amax(0)
        rho = torch.stack([spearman_correlation(m, w) for m in maxima])
        return (-rho).softmax(0).to(maxima.dtype) @ maxima


def spearman_correlation(a: Float[Tensor, "k"], b: Float[Tensor, "k"]) -> Float[Tensor, ""]:
    """Return Spearman's rank correlation, and 0 if one side is constant."""
    return torch.corrcoef(torch.stack([average_ranks(a), average_ranks(b)]))[0, 1].nan_to_num(0.0)


def average_ranks(x: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Return the rank of each value; equal values share their mean rank."""
    _, unique_index, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[unique_index]


def smoothing_factors(
    x: Float[Tensor, "k"], w: Float[Tensor, "k"], a: float, b: float
) -> Float[Tensor, "k"]:
    """Return the smoothing factors x^a / w^b in fp16.

    A channel whose inputs or weights are all 0 gets a factor of 1.

    Args:
        x: Size of each input channel.
        w: Largest weight of each input channel.
        a: Exponent of the inputs.
        b: Exponent of the weights.
    """
    s = (x.float().pow(a) / w.float().pow(b)).clamp(1e-5, torch.finfo(torch.float16).max)
    return s.masked_fill((x == 0) | (w == 0), 1.0).half()


@runtime_checkable
class SmoothingRule(Protocol):
    """Protocol of functions that choose the smoothing factor of each input channel.

    Example:
        >>> def divide_by_largest(weight, x, quantizer, fake_quantize_input):
        ...     return x.abs().amax((0, 1)).clamp(min=1e-5)
        >>> transform = ChannelDivision(64, divide_by_largest)
    """

    def __call__(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> Float[Tensor, "k"]:
        """Return the factors. The arguments are those of `Transform.fit`."""
        ...


class ChannelDivision(Transform):
    """Divide each input channel by a factor, and multiply the weight's channel by it.

    This moves outliers from the input to the weight, or back.

    Args:
        k: Number of input channels.
        rule: Chooses the factors.

    Example:
        >>> transform = ChannelDivision(64, Smoothing().choose_factors)
        >>> transform.fit(weight, x, quantizer, fake_quantize_input)
        >>> smoothed = transform.transform_input(x)
    """

    divisor: Float[Tensor, "k"]

    def __init__(self, k: int, rule: SmoothingRule) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("divisor", torch.ones(k, dtype=torch.float16))

    @torch.no_grad()
    def fit(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> None:
        self.divisor.copy_(self.rule(weight.float(), x.float(), quantizer, fake_quantize_input))

    def transform_input(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return apply_in_fp32(lambda x: x / self.divisor, x)

    def transform_weight(self, w: WeightMatrix) -> WeightMatrix:
        return apply_in_fp32(lambda w: w * self.divisor, w)


@dataclass(frozen=True)
class Smoothing:
    """Smoothing by s = x^alpha / w^(1 - alpha) per channel (SmoothQuant, arXiv:2211.10438).

    The factors s are at least 1e-5.

    Args:
        alpha: Exponent of the inputs. At 1 the input channels become equally large.
        statistic: Size x of each input channel. The size w is the largest weight of the channel.

    Example:
        ``transform=smooth`` in YAML::

            - {kind: smoothing, alpha: 0.5}
    """

    alpha: float = 0.5
    statistic: ChannelStatistic = field(default_factory=ChannelMax)

    def __call__(self, out: int, k: int) -> ChannelDivision:
        return ChannelDivision(k, self.choose_factors)

    def choose_factors(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> Float[Tensor, "k"]:
        """Return the factors. Both quantizers are ignored."""
        x_size, w_size = self.statistic(x, weight), weight.abs().amax(0)
        return smoothing_factors(x_size, w_size, self.alpha, 1 - self.alpha)


@dataclass(frozen=True)
class SmoothingSearch:
    """Smoothing by s = x^a / w^b with the least error of the layer's quantized output.

    The search covers (a, b) = (0, 0), which is no smoothing, and (i / steps, 0) and
    (i / steps, 1 - i / steps) for 0 < i < steps, as in the code of SVDQuant (arXiv:2411.05007):
    39 pairs for 20 steps.

    Args:
        steps: Number of steps from 0 to 1. Exponents a are at the ends of steps, without 1.
        statistic: Size x of each input channel. The size w is the largest weight of the channel.
        branch: The low-rank branch that follows in the chain, if there is one. Each candidate is
            judged by what a branch of the smoothed weight leaves, as in the code of SVDQuant.

    Example:
        >>> transform = SmoothingSearch(branch=LowRank(rank=8))(out=32, k=64)
        >>> transform.fit(weight, x, quantizer, fake_quantize_input)
    """

    steps: int = 20
    statistic: ChannelStatistic = field(default_factory=ChannelMax)
    branch: LowRank | None = None

    def __call__(self, out: int, k: int) -> ChannelDivision:
        return ChannelDivision(k, self.choose_factors)

    def candidate_exponents(self) -> list[tuple[float, float]]:
        """Return the pairs (a, b) to try."""
        grid = [i / self.steps for i in range(1, self.steps)]
        return [(0.0, 0.0), *((a, 0.0) for a in grid), *((a, 1 - a) for a in grid)]

    def make_factors(
        self, x: Float[Tensor, "k"], w: Float[Tensor, "k"], a: float, b: float
    ) -> Float[Tensor, "k"]:
        """Return the factors of one candidate."""
        return smoothing_factors(x, w, a, b)

    def choose_factors(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> Float[Tensor, "k"]:
        """Return the first of the candidates with the least squared error."""
        x_size, w_size = self.statistic(x, weight), weight.abs().amax(0)
        candidates = [
            self.make_factors(x_size, w_size, a, b) for a, b in self.candidate_exponents()
        ]

        def output_error(s: Tensor) -> float:
            smoothed, residual = x / s, weight * s
            if self.branch is not None:  # which the unquantized input multiplies, without an error
                residual = self.branch.subtract_from(residual)
            x_hat, residual_hat = fake_quantize_input(smoothed), quantizer(residual)
            return squared_output_error(smoothed, residual, x_hat, residual_hat)

        return min(candidates, key=output_error)


@dataclass(frozen=True)
class PowerOfTwoSmoothingSearch(SmoothingSearch):
    """`SmoothingSearch` over factors that are rounded to powers of two.

    A number in 16 bits times or divided by such a factor is nearly always a number in 16 bits, so
    that other libraries can move the factors from one tensor to another without rounding.

    Args:
        steps: Number of steps from 0 to 1. Exponents a are at the ends of steps, without 1.
        statistic: Size x of each input channel. The size w is the largest weight of the channel.
        branch: The low-rank branch that follows in the chain, if there is one.

    Example:
        >>> PowerOfTwoSmoothingSearch().make_factors(torch.tensor([3.0]), torch.ones(1), 1.0, 0.0)
        tensor([4.], dtype=torch.float16)
    """

    def make_factors(
        self, x: Float[Tensor, "k"], w: Float[Tensor, "k"], a: float, b: float
    ) -> Float[Tensor, "k"]:
        return super().make_factors(x, w, a, b).float().log2().round().clamp(-16, 15).exp2().half()
