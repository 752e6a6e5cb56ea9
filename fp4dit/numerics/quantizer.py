"""Quantizers: a number format, which values share a scale, and how the scale is chosen.

A row of a weight is an output channel: its inputs, flattened. A row of an activation is a token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams
from fp4dit.numerics.rounding import RoundingFunction, round_to_nearest
from fp4dit.numerics.scale_rules import AbsMax, ScaleRule

PER_ROW_ADVICE = (
    "or list these layers in model_layers.ungroupable=[...], and attention's q, k and v in "
    "model_layers.per_head_operands=[...], for one scale per row"
)


class Granularity(ABC):
    """Base of the granularities: a division of a tensor into blocks that share a scale.

    Example:
        >>> class PerTwoRows(Granularity):
        ...     def width(self, shape):
        ...         return 2 * shape[-1]
        >>> PerTwoRows().split(torch.zeros(4, 64)).shape
        torch.Size([2, 128])
    """

    @abstractmethod
    def width(self, shape: torch.Size) -> int:
        """Return the number of values in a block of a tensor of this shape.

        Raises:
            ValueError: if blocks would straddle rows, or be unequal.
        """

    def split(self, x: Float[Tensor, "..."]) -> Blocks:
        """Return the blocks of a tensor, one a row."""
        return x.reshape(-1, self.width(x.shape))


@dataclass(frozen=True)
class PerTensor(Granularity):
    """Granularity with one scale for the whole tensor.

    Example:
        >>> PerTensor().split(torch.zeros(4, 64)).shape
        torch.Size([1, 256])
    """

    def width(self, shape: torch.Size) -> int:
        return shape.numel()


class PerRow(Granularity):
    """Granularity with one scale for each row: base of `PerChannel` and `PerToken`.

    Example:
        >>> PerRow().width(torch.Size([4, 64]))
        64
    """

    def width(self, shape: torch.Size) -> int:
        return shape[-1]


@dataclass(frozen=True)
class PerChannel(PerRow):
    """Granularity with one scale for each output channel of a weight.

    Example:
        >>> PerChannel().split(torch.zeros(4, 64)).shape
        torch.Size([4, 64])
    """


@dataclass(frozen=True)
class PerToken(PerRow):
    """Granularity with one scale for each token; for q, k and v, for each token and head.

    Example:
        >>> PerToken().split(torch.zeros(2, 5, 64)).shape
        torch.Size([10, 64])
    """


@dataclass(frozen=True)
class PerHead(Granularity):
    """Granularity with one scale for all tokens of a sample and head of q, k or v.

    Example:
        >>> PerHead().split(torch.zeros(2, 4, 5, 64)).shape  # samples, heads, tokens, channels
        torch.Size([8, 320])
    """

    def width(self, shape: torch.Size) -> int:
        return shape[-2:].numel()


@dataclass(frozen=True)
class PerInputChannel(Granularity):
    """Granularity with one scale for each place in a row, the same in all rows.

    The scale rule has to answer with a row of scales, as `PreShift` does.

    Example:
        >>> PerInputChannel().split(torch.zeros(2, 5, 64)).shape
        torch.Size([10, 64])
    """

    def width(self, shape: torch.Size) -> int:
        return shape[-1]


@dataclass(frozen=True)
class PerGroup(Granularity):
    """Granularity with one scale for each `size` neighbors within a row.

    Attributes:
        size: The number of values of a group. It divides the length of a row.

    Example:
        >>> PerGroup(16).split(torch.zeros(4, 64)).shape
        torch.Size([16, 16])
    """

    size: int

    def width(self, shape: torch.Size) -> int:
        if self.size < 1 or shape[-1] % self.size:
            raise ValueError(
                f"a group of {self.size} does not divide a row of {shape[-1]} values. Choose a "
                f"group size that divides {shape[-1]}, {PER_ROW_ADVICE}"
            )
        return self.size


@dataclass(frozen=True)
class PerSplit(Granularity):
    """Granularity with one scale for each of `parts` equal pieces of a row.

    The pieces may be the halves of a concatenation.

    Attributes:
        parts: The number of pieces. It divides the length of a row.

    Example:
        >>> PerSplit(2).split(torch.zeros(4, 64)).shape
        torch.Size([8, 32])
    """

    parts: int

    def width(self, shape: torch.Size) -> int:
        if self.parts < 1 or shape[-1] % self.parts:
            raise ValueError(
                f"a row of {shape[-1]} values does not split into {self.parts} equal parts. Choose "
                f"a number that divides {shape[-1]}, {PER_ROW_ADVICE}"
            )
        return shape[-1] // self.parts


@dataclass(frozen=True)
class Quantizer:
    """A stateless fake-quantizer.

    Called without `qparams`, it computes them from its input: dynamic quantization. If the format
    is selected by the data, `resolve_format` has to come first.

    Attributes:
        format: The number format, or a selection among several.
        granularity: Which values share a scale.
        scale: How the scale of each block is chosen.

    Example:
        >>> quantizer = Quantizer(floating(2, 1), PerGroup(128), AbsMax(dtype=fp16))
        >>> quantizer(weight).shape == weight.shape
        True
    """

    format: Format | FormatSelection
    granularity: Granularity
    scale: ScaleRule = field(default_factory=AbsMax)

    def resolve_format(self, x: Float[Tensor, "..."]) -> "Quantizer":
        """Return this quantizer with the format that `x` selects, if the format is a selection."""
        if not isinstance(self.format, FormatSelection):
            return self
        index = self.format.select_formats(self.granularity.split(x).float(), self.scale)
        return replace(self, format=self.format.format_at(index))

    def compute_qparams(self, x: Float[Tensor, "..."]) -> QParams:
        """Return the scales, and zero points where there are any, that the scale rule gives `x`."""
        assert not isinstance(self.format, FormatSelection), "resolve the format first"
        return self.scale(self.granularity.split(x).float(), self.format)

    def __call__(
        self,
        x: Float[Tensor, "*n"],
        qparams: QParams | None = None,
        rounding: RoundingFunction = round_to_nearest,
    ) -> Float[Tensor, "*n"]:
        """Quantize and dequantize `x`, with given qparams or with those computed from it."""
        assert not isinstance(self.format, FormatSelection), "resolve the format first"
        blocks = self.granularity.split(x).float()
        if qparams is None:
            qparams = self.scale(blocks, self.format)
        output = qparams.from_grid(rounding(qparams.to_grid(blocks), self.format)).view(x.shape)
        if x.dtype == torch.float16:  # whose largest values may be rounded beyond its range
            output = output.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
        return output.to(x.dtype)

    def bits_per_value(self, shape: torch.Size) -> float:
        """Return the bits per value of a tensor of this shape, with scales and format indices."""
        blocks = shape.numel() // self.granularity.width(shape)
        fmt, index_bits = self.format, 0
        if isinstance(fmt, FormatSelection):
            index_bits = fmt.index_bits(blocks, self.scale)
            fmt = fmt.formats[0]  # the scales of all formats of a selection cost the same
        return fmt.bits + (self.scale.storage_bits(fmt, blocks) + index_bits) / shape.numel()
