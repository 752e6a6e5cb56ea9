"""The forecast of which 4-bit format of weights has the least error."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FormatScore:
    """What is expected of a format.

    Attributes:
        ratio: The ratio of signal to noise in dB.
        bits: The bits per weight, with scales.
    """

    ratio: float
    bits: float


@dataclass(frozen=True)
class FormatForecast:
    """What is expected of each 4-bit format, for the layers that a method quantizes to 4 bits.

    The noise is the mean over these layers, by their numbers of values, of the squared error of
    rounding to nearest, relative to the squared weights.

    Attributes:
        same_blocks: The formats with the blocks of the method and fp16 scales, by their words.
        own_blocks: The formats with blocks of their own. Those whose blocks do not divide the rows
            of every layer are left out.
        method: The formats and scales of the method itself.
        share: The share of the weights that was read.
    """

    same_blocks: Mapping[str, FormatScore]
    own_blocks: Mapping[str, FormatScore]
    method: FormatScore
    share: float

    @property
    def winner(self) -> str:
        """The format with the least noise among those with the blocks of the method."""
        return self.sort_same_blocks()[0][0]

    def sort_same_blocks(self) -> list[tuple[str, FormatScore]]:
        """Return the formats with the blocks of the method, the best one first."""
        return sorted(self.same_blocks.items(), key=lambda item: -item[1].ratio)

    @property
    def lead(self) -> float:
        """How far the winner is ahead of the method, in dB; negative if it is behind."""
        return self.same_blocks[self.winner].ratio - self.method.ratio

    def format_lines(self) -> list[str]:
        """Return the forecast as two or three lines for a terminal."""
        place = "ahead of" if self.lead >= 0 else "behind"
        ratios = [f"{name} {score.ratio:.1f}" for name, score in self.sort_same_blocks()]
        lines = [
            f"{self.winner} ({format_score(self.same_blocks[self.winner])}) is expected to win in "
            f"these blocks, {abs(self.lead):.1f} dB {place} this method "
            f"({format_score(self.method)})",
            f"in these blocks: {', '.join(ratios)} dB",
        ]
        if self.own_blocks:
            own = [f"{name} {format_score(score)}" for name, score in self.own_blocks.items()]
            lines.append(f"in blocks of their own: {', '.join(own)}")
        lines[-1] += f"; to nearest, on {max(1, round(100 * self.share))} % of the weights"
        return lines


def format_score(score: FormatScore) -> str:
    """Return a score as text.

    >>> format_score(FormatScore(20.46, 4.5))
    '20.5 dB at 4.50 bits'
    """
    return f"{score.ratio:.1f} dB at {score.bits:.2f} bits"
