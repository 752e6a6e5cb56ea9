"""Scale rules: how the scaling of each block is chosen, and in which format its numbers are kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.formats import Format, NumberFormat, split
from fp4dit.scaling import Affine, Blocks, Column, Offset, Scale, Scaling, TwoSided, parts

Importance = Float[Tensor, "#blocks block"]  # what the error of each value weighs
Some = TypeVar("Some", bound=Scaling)


@runtime_checkable
class ScaleRule(Protocol):
    """Chooses a scaling for each block."""

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scaling:
        """`importance` weighs the errors of a search; a rule that does not search has no use for it."""
        ...

    def cost(self, fmt: Format, blocks: int) -> float:
        """What the scalings of so many blocks, one tensor's, take in storage, in bits."""
        ...


@runtime_checkable
class TensorRule(Protocol):
    """A rule whose answers share something of the whole tensor."""

    def anchored(self, blocks: Blocks) -> ScaleRule:
        """The rule with that something settled on these blocks, so that it answers others on the same scale grid."""
        ...


def anchored(rule: ScaleRule, blocks: Blocks) -> ScaleRule:
    """The rule as it answers for parts or multiples of these blocks."""
    return rule.anchored(blocks) if isinstance(rule, TensorRule) else rule


def stored(scale: Column, fmt: NumberFormat | None) -> Column:
    """The scale as it will be read back; never 0, so that a block of zeros stays one."""
    if fmt is None:
        return scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return fmt.nearest(scale).clamp(min=fmt.smallest)


def width(store: NumberFormat | None) -> float:
    """Bits of one stored number."""
    return float(store.bits) if store else 32.0


def error(
    blocks: Blocks, scaling: Scaling, fmt: Format, p: float = 2.0, importance: Importance | None = None
) -> Column:
    """Each block's sum of importance * |Q(x) - x|^p."""
    difference = scaling.from_grid(fmt.nearest(scaling.to_grid(blocks))).sub_(blocks)  # in place, as in the formats
    power = difference.square_() if p == 2 else difference.abs_().pow_(p)
    return (power if importance is None else power * importance).sum(1, keepdim=True)


def least_error(
    blocks: Blocks, fmt: Format, answers: Iterable[Some], p: float = 2.0, importance: Importance | None = None
) -> Some:
    """Of several scalings the best, block by block; of equals the first. They are drawn one at a time."""
    answers = iter(answers)
    best = next(answers)
    least = error(blocks, best, fmt, p, importance)
    for scaling in answers:
        found = error(blocks, scaling, fmt, p, importance)
        better = found < least
        least = torch.where(better, found, least)
        old, new = parts(best), parts(scaling)
        best = type(best)(**{name: torch.where(better, new[name], old[name]) for name in old})
    return best


@dataclass(frozen=True)
class AbsMax:
    """The smallest symmetric scale that clips nothing. `store` is the format it is kept in, fp32 if None.

    Kept in fp16 it may come out too small by 2^-11 of itself, and clip by as much.
    """

    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        reach = blocks.abs().amax(1, keepdim=True)
        # By a tensor: a GPU divides by a mere number as it multiplies with its reciprocal, one bit off.
        largest = fmt.max if isinstance(fmt.max, Tensor) else torch.full_like(reach[:1], fmt.max)
        return Scale(stored(reach / largest, self.store))

    def cost(self, fmt: Format, blocks: int) -> float:
        return width(self.store) * blocks


@dataclass(frozen=True)
class Deviations:
    """How far a block is taken to reach: `count` population standard deviations, whatever lies beyond.

    2.92247856 has the least squared error for Gaussian values in E2M1 (arXiv:2505.14669, section 4). A constant
    block, which deviates from nothing but by rounding, reaches to its value.
    """

    count: float = 2.92247856

    def __call__(self, blocks: Blocks) -> Column:
        deviation, largest = blocks.std(1, correction=0, keepdim=True), blocks.abs().amax(1, keepdim=True)
        constant = largest * (8 * torch.finfo(blocks.dtype).eps)
        return torch.where(deviation > constant, self.count * deviation, largest + deviation)  # NaN stays NaN


@dataclass(frozen=True)
class RootMeanSquares:
    """As `Deviations`, about 0 and not the mean (arXiv:2502.05003): what lies off zero all together is not clipped."""

    count: float = 2.92247856

    def __call__(self, blocks: Blocks) -> Column:
        reach = self.count * blocks.square().mean(1, keepdim=True).sqrt_()
        return torch.where(reach == 0, blocks.abs().amax(1, keepdim=True), reach)  # squares may be too small for fp32


@dataclass(frozen=True)
class SigmaClip:
    """The largest code lies `kappa` standard deviations of the block from zero (arXiv:2505.14669)."""

    kappa: float = 2.92247856
    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        return Scale(stored(Deviations(self.kappa)(blocks) / fmt.max, self.store))

    def cost(self, fmt: Format, blocks: int) -> float:
        return width(self.store) * blocks


@dataclass(frozen=True)
class TwoSidedAbsMax:
    """The smallest scale for each sign that clips nothing (arXiv:2311.01792).

    Raises:
        ValueError: if the format is unsigned.
    """

    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> TwoSided:
        if fmt.min >= 0:
            raise ValueError(f"{fmt.name} has no negative values to scale: use MinMax or OffsetRange")
        high, low = blocks.amax(1, keepdim=True).clamp(min=0), blocks.amin(1, keepdim=True).clamp(max=0)
        return TwoSided(stored(high / fmt.max, self.store), stored(low / fmt.min, self.store))

    def cost(self, fmt: Format, blocks: int) -> float:
        return 2 * width(self.store) * blocks


@dataclass(frozen=True)
class MinMax:
    """The smallest affine range that holds all values and zero, which stays exact.

    The zero point is whole, so one end may be clipped by up to half a step.
    """

    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Affine:
        low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
        scale = stored((high - low) / (fmt.max - fmt.min), self.store)
        return Affine(scale, (fmt.min - low / scale).round().clamp(fmt.min, fmt.max))

    def cost(self, fmt: Format, blocks: int) -> float:
        return (width(self.store) + fmt.bits) * blocks


@dataclass(frozen=True)
class OffsetRange:
    """The format's range laid over the block's, from its least value up (arXiv:2505.21591); zero may be inexact.

    Where an unsigned float starts at the dense side of a lopsided block, as behind a GELU, it is fine there.
    """

    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Offset:
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        scale = stored((high - low) / (fmt.max - fmt.min), self.store)
        offset = low - fmt.min * scale
        return Offset(scale, self.store.nearest(offset) if self.store else offset)

    def cost(self, fmt: Format, blocks: int) -> float:
        return 2 * width(self.store) * blocks


@dataclass(frozen=True)
class Percentile:
    """What `rule` answers to blocks that lost their outliers: at most (1 - keep) / 2 of the values at each end."""

    rule: ScaleRule = field(default_factory=AbsMax)
    keep: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share of the values above 0 and up to 1, not {self.keep}")

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scaling:
        return self.rule(self.clipped(blocks), fmt, importance)

    def clipped(self, blocks: Blocks) -> Blocks:
        cut = int(round(blocks.shape[1] * (1 - self.keep) / 2, 6))  # 2000 * (1 - 0.999) / 2 is not quite 1
        # torch.quantile refuses more than 2^24 values, and kthvalue takes for ever where they are in order.
        high = blocks.topk(cut + 1, sorted=False).values.amin(1, keepdim=True)
        low = blocks.topk(cut + 1, largest=False, sorted=False).values.amax(1, keepdim=True)
        return blocks.clamp(low, high)

    def anchored(self, blocks: Blocks) -> ScaleRule:
        return replace(self, rule=anchored(self.rule, self.clipped(blocks)))

    def cost(self, fmt: Format, blocks: int) -> float:
        return self.rule.cost(fmt, blocks)


@dataclass(frozen=True)
class MinError:
    """Of a rule's answers to shrunken and stretched blocks, the one with the least error, block by block.

    The error is the sum of |x - Q(x)|^p, weighed by importance; `p` = 2.4 is what the AdaRound and BRECQ authors
    search with. The ratios lie evenly from `highest` to `lowest` times the range; the rule's own answer is always
    among the candidates.
    """

    rule: ScaleRule
    p: float = 2.0
    lowest: float = 0.5
    candidates: int = 50
    highest: float = 1.0

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scaling:
        rule = anchored(self.rule, blocks)
        ratios = torch.linspace(self.highest, self.lowest, self.candidates).tolist()
        tried = (1.0, *(ratio for ratio in ratios if ratio != 1))
        answers = (rule(blocks * ratio, fmt, importance) for ratio in tried)
        return least_error(blocks, fmt, answers, self.p, importance)

    def cost(self, fmt: Format, blocks: int) -> float:
        return self.rule.cost(fmt, blocks)


@dataclass(frozen=True)
class Best:
    """Of what several rules answer, that with the least sum of |x - Q(x)|^p, block by block. All cost the same."""

    rules: Sequence[ScaleRule]
    p: float = 2.0

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scaling:
        answers = (rule(blocks, fmt, importance) for rule in self.rules)
        return least_error(blocks, fmt, answers, self.p, importance)

    def cost(self, fmt: Format, blocks: int) -> float:
        return self.rules[0].cost(fmt, blocks)


@dataclass(frozen=True)
class PreShift:
    """One scale for all, halved up to `span` times for each channel (arXiv:2310.16836, pre-shifted exponent bias).

    Rows are tokens and columns are channels (unit: row). A channel's bias, b_j = constant - log2 max|x_j|, lies
    k_j = clip(round(b_j) - round(rho), 0, span) above the tensor's rho, which `rule` chooses; with AbsMax rho is
    the least b_j. Without a span it is the paper's, 2^E - 1 for the E exponent bits of the format. Dividing by
    s * 2^-k_j is multiplying channel j by 2^k_j, so in hardware 2^-k_j goes into column j of the weight, and the
    activation has one scale.

    That is why `cost` is of one fp32 number. The ceil(log2(span + 1)) bits of each k_j belong to the layer, not to
    the activation: they are fixed, and cost no call anything, as no static scaling does.

    Raises:
        ValueError: if the rule's answer is not a scale alone.
    """

    span: int | None = None
    rule: ScaleRule = field(default_factory=AbsMax)

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        weights = None if importance is None else importance.expand_as(blocks).reshape(1, -1)
        whole = self.rule(blocks.reshape(1, -1), fmt, weights)
        if not isinstance(whole, Scale):
            raise ValueError(f"PreShift halves a scale, and {self.rule} answers with more: use a symmetric rule")
        span = 2 ** split(fmt)[0] - 1 if self.span is None else self.span
        channels = stored(blocks.abs().amax(0, keepdim=True).mT / fmt.max, None).mT
        shifts = (whole.scale.log2().round() - channels.log2().round()).clamp(0, span)
        return Scale(torch.ldexp(whole.scale, -shifts))

    def cost(self, fmt: Format, blocks: int) -> float:
        return 32.0
