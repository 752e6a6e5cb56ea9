"""Scale search that weights the error of each input channel by its importance."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.layer_inputs import iter_sampled_inputs
from fp4dit.numerics.qparams import as_tensors
from fp4dit.numerics.quantizer import Quantizer
from fp4dit.quantization.fake_quant import candidate_formats
from fp4dit.quantization.layers import QuantLayer
from fp4dit.rounding.base import Curve, RoundingMethod
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import ResumableTrainers


@dataclass(frozen=True)
class ImportanceMatrix(RoundingMethod):
    """Search the weights' scales again with an importance matrix, then round with another method.

    The importance of an input channel is its mean square over the calibration rows, as in
    llama.cpp's imatrix. The scale rule of the weights has to search for the scale of least error,
    because other rules ignore the importance.

    Args:
        inner: The method that rounds the weights.
        batch_size: The number of calibration rows of a forward pass.

    Example:
        >>> ImportanceMatrix(inner=GPTQ())
    """

    inner: RoundingMethod = field(default_factory=RoundToNearest)
    batch_size: int = 16

    def check(self, layers: Sequence[QuantLayer]) -> None:
        """Raise an error if the importance would change no scale.

        Raises:
            UserError: if no weight has a scale rule that uses the importance.
        """
        self.inner.check(layers)
        for layer in layers:
            width = layer.weight_matrix.shape[1]
            if uses_importance(layer.weight_fake_quant.quantizer, width):
                return
        raise UserError(
            "no weight's scale is searched, so that an importance matrix would change nothing: "
            "choose weights whose scale is searched, such as weight=fp4_channel_min_error, or "
            "another rounding"
        )

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        square_sums, num_tokens = [torch.zeros(()) for _ in layers], [0] * len(layers)
        rows = dataset.train_rows
        for inputs in iter_sampled_inputs(module, layers, dataset, rows, self.batch_size):
            for i, layer_input in enumerate(inputs):
                if layer_input is not None:
                    x, factor = layer_input
                    square_sums[i] = square_sums[i] + factor * x.float().square().sum((0, 1))
                    num_tokens[i] += round(factor * x.shape[0] * x.shape[1])
        for layer, total, n in zip(layers, square_sums, num_tokens, strict=True):
            if n:
                weight, fake_quant = layer.weight_matrix, layer.weight_fake_quant
                importance = (total / n).expand(weight.shape)
                split = fake_quant.quantizer.granularity.split
                fake_quant.calibrate(weight, split(importance))
        return self.inner.round_unit(module, layers, dataset, trainers)


def uses_importance(quantizer: Quantizer, width: int) -> bool:
    """Return whether a quantizer's scales depend on the importance, tested with random values.

    Args:
        quantizer: The quantizer of a weight.
        width: The number of input channels.
    """
    generator = torch.Generator().manual_seed(0)
    block_size = quantizer.granularity.width(torch.Size([1, width]))
    blocks = torch.randn(16, block_size, generator=generator)
    importance = torch.rand(blocks.shape, generator=generator) ** 8
    for fmt in candidate_formats(quantizer):
        plain = as_tensors(quantizer.scale(blocks, fmt, None)).values()
        weighted = as_tensors(quantizer.scale(blocks, fmt, importance)).values()
        for a, b in zip(plain, weighted, strict=True):
            if not torch.equal(a, b):
                return True
    return False
