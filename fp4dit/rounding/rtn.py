"""Round-to-nearest (RTN), the baseline of all rounding methods."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.numerics.rounding import RoundingFunction, round_to_nearest
from fp4dit.quantization.layers import QuantLayer
from fp4dit.rounding.base import Curve, RoundingMethod, iter_blank_blocks
from fp4dit.utils.resumable import ResumableTrainers


@dataclass(frozen=True)
class RoundToNearest(RoundingMethod):
    """Round each weight by itself, to nearest by default.

    Args:
        rounding: The function that rounds grid values.

    Example:
        >>> RoundToNearest(StochasticRounding(seed=1))
    """

    rounding: RoundingFunction = round_to_nearest

    @property
    def elementwise_rounding(self) -> RoundingFunction:
        return self.rounding

    def check(self, layers: Sequence[QuantLayer]) -> None:
        for block, fmt, _ in iter_blank_blocks(layers):
            self.rounding(block, fmt)

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        for layer in layers:
            layer.commit_weight(self.rounding)
        return []
