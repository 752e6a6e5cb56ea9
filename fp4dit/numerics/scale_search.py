"""Scale rules that search: by least error, by percentile, by channel."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.formats import Format, exponent_and_mantissa_bits
from fp4dit.numerics.qparams import Blocks, QParams, Scale, as_tensors, from_tensors
from fp4dit.numerics.quantizer import PerSplit
from fp4dit.numerics.scale_rules import (
    AbsMax,
    Importance,
    ScaleRule,
    fix_tensor_scale,
    has_free_sign_bit,
    round_scale,
    select_least_error,
)


@dataclass(frozen=True)
class Percentile:
    """The answer of another rule to blocks whose outliers are clipped.

    Attributes:
        inner: The other rule.
        keep: The share of values that is kept: at most (1 - keep) / 2 are clipped at each end.

    Example:
        >>> blocks = torch.tensor([[1.0, 2.0, 3.0, 90.0]])
        >>> Percentile(AbsMax(), keep=0.5)(blocks, floating(2, 1)).scale
        tensor([[0.5000]])
    """

    inner: ScaleRule = field(default_factory=AbsMax)
    keep: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"keep must be a share of the values above 0 and up to 1, not {self.keep}"
            )

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> QParams:
        return self.inner(self.clip_outliers(blocks), fmt, importance)

    def clip_outliers(self, blocks: Blocks) -> Blocks:
        # Rounded first, because 2000 * (1 - 0.999) / 2 is not quite 1.
        cut = int(round(blocks.shape[1] * (1 - self.keep) / 2, 6))
        # torch.quantile refuses more than 2^24 values, and kthvalue is very slow on sorted ones.
        high = blocks.topk(cut + 1, sorted=False).values.amin(1, keepdim=True)
        low = blocks.topk(cut + 1, largest=False, sorted=False).values.amax(1, keepdim=True)
        return blocks.clamp(low, high)

    def with_tensor_scale_of(self, blocks: Blocks) -> ScaleRule:
        return replace(self, inner=fix_tensor_scale(self.inner, self.clip_outliers(blocks)))

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return self.inner.storage_bits(fmt, blocks)


@dataclass(frozen=True)
class Quantile(Percentile):
    """`Percentile` whose ends lie between two values, as the quantiles of torch and NumPy do.

    It matters for short blocks: in a row of 1152 values, a share of 1 / 10,000 is less than one
    value, which `Percentile` does not clip.

    Attributes:
        inner: The other rule.
        keep: The share of values between the two quantiles (1 - keep) / 2 and (1 + keep) / 2.

    Example:
        >>> blocks = torch.tensor([[-4.0, 1.0, 2.0, 3.0, 4.0]])
        >>> Quantile(AbsMax(), keep=0.75)(blocks, floating(2, 1)).scale  # from -1.5 to 3.5
        tensor([[0.5833]])
    """

    def clip_outliers(self, blocks: Blocks) -> Blocks:
        width = blocks.shape[1]
        place = (width - 1) * (1 - self.keep) / 2
        whole = int(place)
        ends = []
        for largest in (False, True):  # torch.quantile refuses more than 2^24 values
            values = blocks.topk(min(whole + 2, width), largest=largest).values
            ends.append(torch.lerp(values[:, whole, None], values[:, -1:], place - whole))
        low, high = ends
        return blocks.clamp(low, high)


@dataclass(frozen=True)
class SearchedRule:
    """Base of rules that search with another rule, and store what it stores.

    Attributes:
        inner: The other rule.
    """

    inner: ScaleRule

    @property
    def has_free_sign_bit(self) -> bool:
        return has_free_sign_bit(self.inner)

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return self.inner.storage_bits(fmt, blocks)


@dataclass(frozen=True)
class MinError(SearchedRule):
    """The least error among a rule's answers to shrunken and stretched blocks, block by block.

    The error is the sum of importance * |x - Q(x)|^p. The ratios are spaced evenly from `highest`
    to `lowest` times the range; the rule's own answer (ratio 1) is always among the candidates.

    Attributes:
        inner: The rule.
        p: Exponent of the error; 2.4 is what the authors of AdaRound and BRECQ search with.
        lowest: The least ratio.
        candidates: How many ratios are tried.
        highest: The largest ratio.

    Example:
        >>> rule = MinError(AbsMax(), lowest=0.1, highest=1.2, candidates=111)
        >>> rule(blocks, floating(2, 1)).scale.shape == (len(blocks), 1)
        True
    """

    p: float = 2.0
    lowest: float = 0.5
    candidates: int = 50
    highest: float = 1.0

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> QParams:
        rule = fix_tensor_scale(self.inner, blocks)
        spaced = torch.linspace(self.highest, self.lowest, self.candidates).tolist()
        ratios = [1.0, *(ratio for ratio in spaced if ratio != 1)]
        answers = (rule(blocks * ratio, fmt, importance) for ratio in ratios)
        return select_least_error(blocks, fmt, answers, self.p, importance)


@dataclass(frozen=True)
class LeastErrorClip(SearchedRule):
    """The answer of another rule to blocks that are clipped where a real scale has the least error.

    The ratio of the clipped range to the whole is the one with the least sum of
    importance * |x - Q(x)|^p, where Q has a scale that is not rounded to how it is stored; the
    inner rule rounds it afterwards. Its scale of the tensor is that of the blocks before they are
    clipped. The defaults are those of FP-Quant, the code of MR-GPTQ (arXiv:2509.23202), with
    --w_observer=mse.

    Attributes:
        inner: The other rule.
        p: Exponent of the error.
        lowest: The least ratio.
        candidates: How many ratios are tried, spaced evenly from 1 to `lowest`.

    Example:
        >>> blocks = torch.tensor([[6.0, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4]])
        >>> LeastErrorClip(AbsMax())(blocks, floating(2, 1)).scale
        tensor([[0.9360]])
    """

    p: float = 2.4
    lowest: float = 0.208
    candidates: int = 100

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> QParams:
        rule = fix_tensor_scale(self.inner, blocks)
        whole = AbsMax()(blocks, fmt).scale
        ratios = torch.linspace(1, self.lowest, self.candidates).tolist()
        scales = (Scale(whole * ratio) for ratio in ratios)
        reach = select_least_error(blocks, fmt, scales, self.p, importance).scale * fmt.max
        return rule(blocks.clamp(-reach, reach), fmt, importance)

    def with_tensor_scale_of(self, blocks: Blocks) -> ScaleRule:
        return replace(self, inner=fix_tensor_scale(self.inner, blocks))


@dataclass(frozen=True)
class BestOf:
    """The least error among the answers of several rules, block by block.

    All rules have to take the same storage. The error is the sum of importance * |x - Q(x)|^p.

    Attributes:
        rules: The rules.
        p: Exponent of the error.

    Example:
        >>> rules = [Percentile(MinMax(), keep=0.99), Percentile(MinMax(), keep=0.999)]
        >>> rule = BestOf(rules, p=2.4)
    """

    rules: Sequence[ScaleRule]
    p: float = 2.0

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> QParams:
        answers = (rule(blocks, fmt, importance) for rule in self.rules)
        return select_least_error(blocks, fmt, answers, self.p, importance)

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return self.rules[0].storage_bits(fmt, blocks)


@dataclass(frozen=True)
class PartScales:
    """The answers of another rule to equal parts of all rows, as a row with a scale for each place.

    It serves static activations that are concatenations, with `granularity: input_channel`
    (Q-Diffusion, arXiv:2302.04304). `storage_bits` is that of the inner rule for the parts.

    Attributes:
        inner: The rule that chooses the scale of each part.
        parts: The number of parts, which divides the length of a row.

    Example:
        >>> PartScales(AbsMax())(torch.tensor([[1.0, 3.0, -12.0, 2.0]]), floating(2, 1)).scale
        tensor([[0.5000, 0.5000, 2.0000, 2.0000]])
    """

    inner: ScaleRule
    parts: int = 2

    def __call__(
        self, blocks: Blocks, fmt: Format, importance: Importance | None = None
    ) -> QParams:
        size = PerSplit(self.parts).width(blocks.shape)
        joined = join_parts(blocks, size)
        weights = None if importance is None else join_parts(importance.expand_as(blocks), size)
        rows = {}
        for name, tensor in as_tensors(self.inner(joined, fmt, weights)).items():
            rows[name] = tensor.expand(-1, size).reshape(1, -1)
        return from_tensors(rows)

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return self.inner.storage_bits(fmt, self.parts)


def join_parts(blocks: Float[Tensor, "rows width"], size: int) -> Float[Tensor, "parts values"]:
    """Return the parts of all rows, one part a row."""
    return blocks.unflatten(1, (-1, size)).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class PreShift:
    """Scale rule with one scale for a tensor, halved up to `span` times for each channel.

    This is the pre-shifted exponent bias of LLM-FP4 (arXiv:2310.16836). Rows are tokens and columns
    are channels. A channel's bias, b_j = constant - log2 max|x_j|, lies
    k_j = clip(round(b_j) - round(rho), 0, span) above the tensor's rho, which `inner` chooses; with
    AbsMax, rho is the least b_j. Dividing by s * 2^-k_j is multiplying channel j by 2^k_j, so in
    hardware 2^-k_j goes into column j of the weight, and the activation has one scale.

    `storage_bits` is therefore that of one fp32 number. The ceil(log2(span + 1)) bits of each k_j
    belong to the layer: they are static, and cost no call anything.

    Attributes:
        span: The largest k_j; None is that of the paper, 2^E - 1 for the E exponent bits of the
            format.
        inner: The rule that chooses the scale of the tensor.

    Raises:
        ValueError: if the inner rule does not answer with a symmetric scale.

    Example:
        >>> PreShift(3)(torch.tensor([[8.0, 1.0]]), floating(2, 1)).scale.shape
        torch.Size([1, 2])
    """

    span: int | None = None
    inner: ScaleRule = field(default_factory=AbsMax)

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        weights = None if importance is None else importance.expand_as(blocks).reshape(1, -1)
        tensor = self.inner(blocks.reshape(1, -1), fmt, weights)
        if not isinstance(tensor, Scale):
            raise ValueError(
                f"PreShift halves a scale, and {self.inner} answers with more: use a symmetric rule"
            )
        span = self.span
        if span is None:
            span = 2 ** exponent_and_mantissa_bits(fmt)[0] - 1
        channels = round_scale(blocks.abs().amax(0, keepdim=True).mT / fmt.max, None).mT
        shifts = (tensor.scale.log2().round() - channels.log2().round()).clamp(0, span)
        return Scale(torch.ldexp(tensor.scale, -shifts))

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return 32.0
