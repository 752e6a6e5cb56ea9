"""Base class of rounding methods."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import QParams
from fp4dit.numerics.quantizer import Quantizer
from fp4dit.numerics.rounding import RoundingFunction
from fp4dit.quantization.fake_quant import candidate_formats
from fp4dit.quantization.layers import QuantLayer
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import ResumableTrainers

# The points of a learning curve. Each has a `step`, its `error` as a share of the error of rounding
# to nearest, and its `rounding_loss` as a mean over all roundings.
Curve = list[dict[str, str | int | float]]


class RoundingMethod(ABC):
    """Base of methods that round the weights of a unit's quantized layers to hard weights.

    A subclass is a frozen dataclass whose fields are the keys of its file in `conf/rounding`.
    `fp4dit.estimate.rounding` estimates its time and memory, and counts a method without an
    estimate as free.

    Example:
        >>> @dataclass(frozen=True)
        ... class RoundDown(RoundingMethod):
        ...     def round_unit(self, module, layers, dataset, trainers):
        ...         for layer in layers:
        ...             layer.commit_weight(lambda x, fmt: fmt.bracket(x)[0])
        ...         return []
    """

    @abstractmethod
    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        """Round the weights of the layers in place.

        Args:
            module: The unit, whose layers have their scales and transforms.
            layers: The quantized layers of the unit. The method calls `commit_weight` of each.
            dataset: The unit's inputs in the quantized model and outputs in the original one.
            trainers: Makes Trainers whose fits can be resumed. A method that does not train can
                iterate over `resume.iter_unfinished_layers` to be resumed at a layer.

        Returns:
            The learning curve; an empty list if nothing is learned.
        """

    @property
    def elementwise_rounding(self) -> RoundingFunction | None:
        """The function that rounds each weight by itself, or None if the method reads inputs.

        If it is not None, then `round_unit` only calls `commit_weight` with it.
        """
        return None

    def check(self, layers: Sequence[QuantLayer]) -> None:  # noqa: B027  # an optional hook
        """Raise an error if the method cannot round these layers. Their weights are not read.

        Raises:
            ValueError: if it cannot.
        """


def check_curve(method: RoundingMethod, curve: Curve) -> Curve:
    """Return what a method's `round_unit` has returned, if it is a learning curve.

    Raises:
        UserError: if it is not a list, because a method forgot its last line.
    """
    if not isinstance(curve, list):
        raise UserError(
            f"{type(method).__name__}.round_unit has returned {curve!r}: it must return the "
            "learning curve, which is an empty list if nothing is learned; end it with `return []`"
        )
    return curve


def iter_blank_blocks(
    layers: Sequence[QuantLayer],
) -> Iterator[tuple[Float[Tensor, "1 n"], Format, QParams]]:
    """Yield a block of zeros for each kind of layer and candidate format, with format and qparams.

    Layers of one kind have the same quantizer and block size.
    """
    kinds: list[tuple[Quantizer, int]] = []
    for layer in layers:
        quantizer = layer.weight_fake_quant.quantizer
        row_shape = torch.Size([1, layer.weight_matrix.shape[1]])
        kind = quantizer, quantizer.granularity.width(row_shape)
        if kind not in kinds:  # a list, because a FormatSelection is not hashable
            kinds.append(kind)
    for quantizer, width in kinds:
        block = torch.zeros(1, width)
        for fmt in candidate_formats(quantizer):
            yield block, fmt, quantizer.scale(block, fmt)
