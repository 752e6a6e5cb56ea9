"""GPTQ (arXiv:2210.17323): rounding of a unit's layers with the second moments of their inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.layer_inputs import iter_sampled_inputs
from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.quantization.layers import QuantLayer
from fp4dit.rounding.base import Curve, RoundingMethod, iter_blank_blocks
from fp4dit.rounding.gptq_columns import (
    ColumnOrder,
    Hessian,
    natural_order,
    quantize_with_gptq,
    quantize_with_rescaled_groups,
)
from fp4dit.rounding.resume import iter_unfinished_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import ResumableTrainers


@dataclass(frozen=True)
class GPTQ(RoundingMethod):
    """Round with GPTQ (arXiv:2210.17323): later columns compensate the error of earlier ones.

    The Hessian of a layer comes from the inputs that it has while no weight of the unit is rounded.
    A layer that the calibration rows do not reach is rounded to nearest.

    Args:
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        block_size: Number of columns computed together. It changes the speed only.
        order: Order in which the columns are rounded.
        batch_size: Number of calibration rows of a forward pass.
        rescale: Whether the scales of a group are chosen again when its first column is reached,
            which needs the natural order. See `quantize_with_rescaled_groups`.

    Example:
        >>> GPTQ(damping=0.01, order=activation_order)
    """

    damping: float = 0.01
    block_size: int = 128
    order: ColumnOrder = natural_order
    batch_size: int = 16
    rescale: bool = False

    def check(self, layers: Sequence[QuantLayer]) -> None:
        """Raise an error if values of a format share bits, because columns are rounded one by one.

        Raises:
            UserError: if a layer has such a format, or if groups are measured again in an order or
                with formats for which that is not defined.
        """
        for block, fmt, _ in iter_blank_blocks(layers):
            fmt.bracket(block)  # raises the error for such a format
        if not self.rescale:
            return
        if self.order is not natural_order:
            raise UserError(
                "the columns of a group follow one another only in the natural order: "
                "rounding.rescale=false keeps the scales of groups in any order"
            )
        for layer in layers:
            fmt = layer.weight_fake_quant.quantizer.format
            if isinstance(fmt, FormatSelection) and fmt.per == "block":
                raise UserError(
                    "formats are selected per block before the scales of groups are measured "
                    "again: choose a format per layer, or rounding.rescale=false"
                )

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        hessians = compute_hessians(module, layers, dataset, self.batch_size)
        for number, layer in iter_unfinished_layers(module, layers, trainers):
            # Each Hessian is freed once its layer is rounded.
            hessian, hessians[number] = hessians[number], None
            if hessian is not None:
                self.round_layer(layer, hessian)
            layer.commit_weight()
        return []

    def round_layer(self, layer: QuantLayer, hessian: Hessian) -> None:
        """Write the hard weight of a layer, and its qparams if they are chosen again."""
        fake_quant = layer.weight_fake_quant
        qparams, fmt = fake_quant.qparams, fake_quant.format
        assert qparams is not None, "prepare the layer first"
        if self.rescale:
            quantizer = replace(fake_quant.quantizer, format=fmt)
            weight, qparams = quantize_with_rescaled_groups(
                layer.weight_matrix, hessian, quantizer, self.damping
            )
            fake_quant.set_qparams(qparams)
        else:
            weight = quantize_with_gptq(
                *(layer.weight_matrix, hessian, qparams, fmt),
                *(self.block_size, self.damping, self.order),
            )
        layer.write_weight(weight)


@torch.no_grad()
def compute_hessians(
    module: nn.Module, layers: list[QuantLayer], dataset: UnitDataset, batch_size: int
) -> list[Hessian | None]:
    """Compute the sum of x x^T over the inputs of each layer's matmul, in fp32.

    If the dataset has a sample of tokens, it is an unbiased estimate of that sum.

    Returns:
        A matrix for each layer; None for a layer that the calibration rows do not reach.
    """
    hessians: list[Hessian | None] = [None] * len(layers)
    for inputs in iter_sampled_inputs(module, layers, dataset, dataset.train_rows, batch_size):
        # Layers that read the same tensor, as q, k and v do, share the product.
        products: dict[tuple, Hessian] = {}
        for i, layer_input in enumerate(inputs):
            if layer_input is None:
                continue
            x, factor = layer_input
            tensor_key = (x.data_ptr(), x.shape, x.stride())
            if tensor_key not in products:
                products[tensor_key] = multiply_by_transpose(x)
                if factor != 1:
                    products[tensor_key] *= factor
            product, hessian = products[tensor_key], hessians[i]
            hessians[i] = product.clone() if hessian is None else hessian.add_(product)
    return hessians


def multiply_by_transpose(x: Float[Tensor, "... k"]) -> Hessian:
    """Return the sum of x x^T over all vectors of a batch."""
    tokens = x.flatten(0, -2).float()
    return tokens.T @ tokens
