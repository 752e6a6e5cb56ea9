"""Format selection: number formats chosen by the data, for a tensor or for each block of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, PerBlock
from fp4dit.numerics.scale_rules import ScaleRule, has_free_sign_bit, quantization_error

FormatCosts = Float[Tensor, "formats blocks"]

FormatIndex = UInt8[Tensor, "n 1"]


@runtime_checkable
class SelectionCriterion(Protocol):
    """A cost of each format for each block; the format with the least cost is selected.

    Example:
        >>> def prefer_first(blocks, formats, rule):
        ...     return torch.arange(len(formats)).float()[:, None].expand(-1, len(blocks))
        >>> selection = FormatSelection([floating(2, 1), floating(1, 2)], by=prefer_first)
    """

    def __call__(
        self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule
    ) -> FormatCosts: ...


@dataclass(frozen=True)
class LeastError:
    """The sum of |x - Q(x)|^p, with the scale that the rule gives each format.

    Attributes:
        p: The power of an error.

    Example:
        >>> FormatSelection([floating(3, 0), floating(2, 1), floating(1, 2)], by=LeastError())
    """

    p: float = 2.0

    def __call__(self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule) -> FormatCosts:
        errors = []
        for fmt in formats:
            errors.append(quantization_error(blocks, rule(blocks, fmt), fmt, self.p)[:, 0])
        return torch.stack(errors)


@dataclass(frozen=True)
class RangeRatio:
    """The distance in octaves between the range of the magnitudes and the range of the format.

    The range of the magnitudes is max / quantile, that of the format is max / smallest. This is a
    reconstruction of how HQ-DiT (arXiv:2405.19751) selects among E3M0, E2M1 and E1M2: no code was
    published, and the text says only that a ratio of the weights decides.

    Attributes:
        quantile: Which quantile of the magnitudes is the lower end of their range.
        pooled: Whether the ratio is measured once over all blocks instead of over each block.

    Example:
        >>> FormatSelection([floating(2, 1), floating(1, 2)], by=RangeRatio(quantile=0.25))
    """

    quantile: float = 0.25
    pooled: bool = False

    def __call__(self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule) -> FormatCosts:
        magnitudes = blocks.abs().reshape(1, -1) if self.pooled else blocks.abs()
        rank = 1 + round(self.quantile * (magnitudes.shape[1] - 1))
        low = magnitudes.kthvalue(rank, dim=1).values
        tiny = torch.finfo(low.dtype).tiny  # a block of zeros has a ratio of 1
        ratio = magnitudes.amax(1).clamp(min=tiny).log2() - low.clamp(min=tiny).log2()
        costs = []
        for fmt in formats:
            costs.append((ratio - math.log2(dynamic_range(fmt))).abs().expand(len(blocks)))
        return torch.stack(costs)


def dynamic_range(fmt: Format) -> float:
    """Return the ratio of a format's largest value to its smallest positive one."""
    values = fmt.values()
    return fmt.max / values[values > 0].min().item()


@dataclass(frozen=True)
class FormatSelection:
    """A format yet to be selected by the data, among several of the same number of bits.

    Among equals, the earlier format is selected.

    Attributes:
        formats: The formats.
        by: The cost of each format for each block.
        per: "tensor" selects one format for the tensor, that with the least summed cost; "block"
            selects one for each block; "majority" selects one for the tensor by the vote of its
            blocks, as in FP8 Quantization (arXiv:2208.09225).

    Raises:
        ValueError: if the formats have different numbers of bits.

    Example:
        >>> selection = FormatSelection([floating(2, 1), integer(4)], LeastError(), per="block")
        >>> selection.name
        'e2m1|int4'
    """

    formats: Sequence[Format]
    by: SelectionCriterion
    per: Literal["tensor", "block", "majority"] = "tensor"

    def __post_init__(self) -> None:
        if len({fmt.bits for fmt in self.formats}) != 1:
            bits = ", ".join(f"{fmt.name} has {fmt.bits:g}" for fmt in self.formats)
            raise ValueError(
                f"choose between formats of the same number of bits: {bits or 'none was given'}"
            )

    @property
    def name(self) -> str:
        return join_names(self.formats)

    @property
    def bits(self) -> float:
        return float(self.formats[0].bits)

    def index_bits(self, blocks: int, rule: ScaleRule) -> int:
        """Return the bits beside the scales that say which format each of so many blocks has.

        A single index for a tensor is not counted. The sign bit of an E4M3 scale says which of two
        formats a block has, as in IF4 (arXiv:2603.28765), and takes no bit more.
        """
        if self.per != "block" or (len(self.formats) == 2 and has_free_sign_bit(rule)):
            return 0
        return math.ceil(math.log2(len(self.formats))) * blocks

    def select_formats(self, blocks: Blocks, rule: ScaleRule) -> FormatIndex:
        """Return the index into `formats` of the tensor, or of each block."""
        costs = self.by(blocks, self.formats, rule)
        best = costs.T.contiguous().argmin(1)  # eight times as fast along rows
        if self.per == "tensor":
            best = costs.sum(1).argmin(0, keepdim=True)
        if self.per == "majority":
            best = best.bincount(minlength=len(self.formats)).argmax(0, keepdim=True)
        return best.to(torch.uint8).unsqueeze(1)

    def format_at(self, format_index: FormatIndex) -> Format:
        """Return the format, or the formats block by block, that an index selects."""
        if format_index.numel() == 1:
            return self.formats[int(format_index)]
        # Its max and min are tensors.
        return PerBlockFormat(self.formats, format_index)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class PerBlockFormat:
    """A format of its own for each block. `max` and `min` have a number for each block.

    Attributes:
        formats: The formats.
        format_index: Which of them each block has.

    Example:
        >>> format_index = torch.tensor([[0], [1]], dtype=torch.uint8)
        >>> PerBlockFormat([floating(2, 1), integer(4)], format_index).max
        tensor([[6.],
                [7.]])
    """

    formats: Sequence[Format]
    format_index: UInt8[Tensor, "blocks 1"]

    @property
    def name(self) -> str:
        return join_names(self.formats)

    @property
    def bits(self) -> float:
        return float(self.formats[0].bits)

    @property
    def max(self) -> PerBlock:
        return self.per_block_value([fmt.max for fmt in self.formats])

    @property
    def min(self) -> PerBlock:
        return self.per_block_value([fmt.min for fmt in self.formats])

    def per_block_value(self, ends: Sequence[float]) -> PerBlock:
        return torch.tensor(ends, device=self.format_index.device)[self.format_index.long()]

    def step(self, x: Blocks) -> Blocks:
        return self.apply_per_block(lambda fmt, x: (fmt.step(x),), x)[0]

    def bracket(self, x: Blocks) -> tuple[Blocks, Blocks]:
        inner, outer = self.apply_per_block(lambda fmt, x: fmt.bracket(x), x)
        return inner, outer

    def nearest(self, x: Blocks) -> Blocks:
        return self.apply_per_block(lambda fmt, x: (fmt.nearest(x),), x)[0]

    def apply_per_block(
        self, function: Callable[[Format, Blocks], tuple[Blocks, ...]], x: Blocks
    ) -> tuple[Blocks, ...]:
        """Return the function's answers with each block's own format."""
        answers = function(self.formats[0], x)
        for i, fmt in enumerate(self.formats[1:], 1):
            pairs = zip(function(fmt, x), answers, strict=True)
            answers = tuple(torch.where(self.format_index == i, new, old) for new, old in pairs)
        return answers

    def values(self) -> Float[Tensor, "v"]:
        """Return every value that some block may hold, ascending."""
        return torch.cat([fmt.values() for fmt in self.formats]).unique()


def join_names(formats: Sequence[Format]) -> str:
    return "|".join(fmt.name for fmt in formats)
