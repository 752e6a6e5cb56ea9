"""Reconstruction of single layers instead of whole blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.layer_inputs import iter_sampled_inputs
from fp4dit.models.blocks import Unit
from fp4dit.quantization.layers import QuantLayer
from fp4dit.rounding.base import Curve, RoundingMethod, check_curve
from fp4dit.utils.calls import Call
from fp4dit.utils.resumable import ResumableTrainers


@dataclass(frozen=True)
class LayerwiseReconstruction(RoundingMethod):
    """Reconstruct one layer after another instead of the whole unit.

    The inputs of a layer are computed after the layers before it are rounded. The targets are the
    products of these inputs and the layer's weight in full precision.

    Args:
        inner: The method that rounds each layer.
        batch_size: The number of rows of a forward pass that computes a layer's inputs.

    Example:
        >>> LayerwiseReconstruction(inner=learned_rounding)
    """

    inner: RoundingMethod
    batch_size: int = 16

    def check(self, layers: Sequence[QuantLayer]) -> None:
        self.inner.check(layers)

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        curves, device = [], layers[0].weight.device
        results = trainers.make_results()
        for layer, part in zip(layers, results.load(), strict=False):
            layer.load_state_dict(part["state"])
            curves.append(part["curve"])

        def make_parts() -> list[dict[str, Any]]:
            parts = zip(layers, curves, strict=False)
            return [{"state": layer.state_dict(), "curve": curve} for layer, curve in parts]

        for number, layer in enumerate(layers[len(curves) :], len(curves)):
            # A Trainer leaves its module on the CPU, and so does loading a file.
            module.to(device)
            layer_trainers = trainers.for_part(f"layer_{number:02}")
            curves.append(self.round_layer(module, layer, dataset, layer_trainers))
            results.save(make_parts)
        return [point for curve in curves for point in curve]

    def round_layer(
        self,
        module: nn.Module,
        layer: QuantLayer,
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        """Round one layer; to nearest, if the calibration rows do not reach it."""
        rows, memory = dataset.train_rows, dataset.memory
        batches = iter_sampled_inputs(module, [layer], dataset, rows, self.batch_size)
        x = memory.gather(len(rows), (found.x for [found] in batches if found is not None))
        if x is None:
            layer.commit_weight()
            return []
        product = LayerProduct(layer)
        unit = Unit("", ("x",), lambda state: Call((state["x"],), {}), ("y",))
        target = memory.gather(len(x), self._iter_targets(product, x))
        assert target is not None
        layer_dataset = UnitDataset(unit, {"x": x}, {"y": target}, torch.arange(len(x)), memory)
        curve = self.inner.round_unit(product, [layer], layer_dataset, trainers)
        return check_curve(self.inner, curve)

    @torch.no_grad()
    def _iter_targets(self, product: "LayerProduct", x: Any) -> Iterator[Tensor]:
        """Yield the products of the inputs `x` and the weight before it is rounded, by batches."""
        device = product.layer.weight.device
        for start in range(0, len(x), self.batch_size):
            yield product(x[start : start + self.batch_size].to(device))


class LayerProduct(nn.Module):
    """The matmul of a quantized layer, without its transforms and its input quantizer.

    Args:
        layer: The layer.

    Example:
        >>> product = LayerProduct(quant_layer)
        >>> y = product(x)  # quant_layer.multiply(x)
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "b t k"]) -> Float[Tensor, "b t o"]:
        return self.layer.multiply(x)
