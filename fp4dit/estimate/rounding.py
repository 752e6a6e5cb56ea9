"""Estimates of the operations and memory of rounding methods.

The estimates do not include the passes that propagate the models. `@estimate_unit_cost.register`
adds an estimate for a method. A method without an estimate counts as free.
"""

from dataclasses import dataclass, replace
from functools import singledispatch

import torch

from fp4dit.estimate.footprint import UnitFootprint
from fp4dit.quantization.fake_quant import candidate_formats
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.gptq import GPTQ
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.learned import LearnedRounding
from fp4dit.rounding.output_search import OutputSearch
from fp4dit.rounding.staged import StagedReconstruction


@dataclass(frozen=True)
class UnitCost:
    """The cost of rounding one unit.

    Attributes:
        flops: The operations.
        bytes: The memory of the device.
    """

    flops: int = 0
    bytes: int = 0


@singledispatch
def estimate_unit_cost(method: RoundingMethod, unit: UnitFootprint, num_rows: int) -> UnitCost:
    """Estimate the cost of rounding a unit.

    Args:
        method: The rounding method.
        unit: The footprint of the unit.
        num_rows: The number of calibration rows to learn from.
    """
    return UnitCost()


@estimate_unit_cost.register
def estimate_layerwise_cost(
    method: LayerwiseReconstruction, unit: UnitFootprint, num_rows: int
) -> UnitCost:
    """Add a pass of the whole unit for the inputs of each layer to the cost of the inner method.

    The inner method learns each layer from the inputs of that layer. For all layers together, this
    costs about as much as learning the unit.
    """
    inner = estimate_unit_cost(method.inner, unit, num_rows)
    return replace(inner, flops=inner.flops + len(unit.layers) * num_rows * unit.flops)


@estimate_unit_cost.register
def estimate_learned_cost(method: LearnedRounding, unit: UnitFootprint, num_rows: int) -> UnitCost:
    """Count three forward passes for each step, because a backward pass costs about two of them.

    Each weight takes ten numbers in fp32: its learned parameter, the gradient, Adam's two moments,
    and about six intermediate values.
    """
    weights = sum(layer.weight_matrix.numel() for layer in unit.layers)
    flops = 3 * method.steps * method.batch_size * unit.flops
    return UnitCost(flops, method.batch_size * unit.saved_bytes + 40 * weights)


@estimate_unit_cost.register
def estimate_staged_cost(
    method: StagedReconstruction, unit: UnitFootprint, num_rows: int
) -> UnitCost:
    """Add the operations of both stages, of which one needs its memory at a time."""
    first = estimate_unit_cost(method.weights, unit, num_rows)
    second = estimate_unit_cost(method.inputs, unit, num_rows)
    return UnitCost(first.flops + second.flops, max(first.bytes, second.bytes))


@estimate_unit_cost.register
def estimate_gptq_cost(method: GPTQ, unit: UnitFootprint, num_rows: int) -> UnitCost:
    """Count two passes over the rows, because the Hessians cost about as much as a pass.

    The memory holds all Hessians, and two working copies of the largest, in fp32. The loop over
    columns is not counted, although it takes half of the time on a small model.
    """
    widths = [layer.weight_matrix.shape[1] for layer in unit.layers]
    hessian_bytes = sum(4 * width**2 for width in widths) + 8 * max(widths) ** 2
    return UnitCost(2 * num_rows * unit.flops, method.batch_size * unit.peak_bytes + hessian_bytes)


@estimate_unit_cost.register
def estimate_imatrix_cost(method: ImportanceMatrix, unit: UnitFootprint, num_rows: int) -> UnitCost:
    """Add a pass over the rows to the cost of the inner method."""
    inner = estimate_unit_cost(method.inner, unit, num_rows)
    return UnitCost(
        inner.flops + num_rows * unit.flops,
        max(inner.bytes, method.batch_size * unit.peak_bytes),
    )


@estimate_unit_cost.register
def estimate_search_cost(method: OutputSearch, unit: UnitFootprint, num_rows: int) -> UnitCost:
    """Count a pass over the rows, and two matmuls for each range of each format and round.

    The search of the weight multiplies the weight by the products of the layer's inputs, and that
    of the input multiplies the sampled inputs by the weight.
    """
    search = 0
    for layer in unit.layers:
        outputs, inputs = layer.weight_matrix.shape
        ranges = 0
        for fmt in candidate_formats(layer.weight_fake_quant.quantizer):
            ranges += len(list(method.candidates(torch.ones(1), fmt)))
        search += 2 * method.rounds * ranges * outputs * inputs * (inputs + method.tokens)
    return UnitCost(num_rows * unit.flops + search, method.batch_size * unit.peak_bytes)
