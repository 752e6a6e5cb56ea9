"""Rounding of a unit's weights, and then learning of its inputs' steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.quantization.layers import QuantLayer
from fp4dit.rounding.base import Curve, RoundingMethod, check_curve
from fp4dit.rounding.input_steps import bypass_inputs
from fp4dit.rounding.learned import LearnedRounding
from fp4dit.utils.resumable import ResumableTrainers


@dataclass(frozen=True)
class StagedReconstruction(RoundingMethod):
    """Round the weights with unquantized inputs, then learn the steps of the quantized inputs.

    These are the two stages of Q-Diffusion (arXiv:2302.04304), here for one unit after another
    instead of one stage for the whole model before the next.

    Args:
        weights: The method of the first stage.
        inputs: The method of the second stage. Its learner is `FixedWeight`.

    Example:
        >>> steps = InputSteps(lr=4e-4)
        >>> inputs = LearnedRounding(FixedWeight, adam, RelativeMSE(), 5000, 16, inputs=steps)
        >>> method = StagedReconstruction(weights=GPTQ(), inputs=inputs)
    """

    weights: RoundingMethod
    inputs: LearnedRounding

    def check(self, layers: Sequence[QuantLayer]) -> None:
        self.weights.check(layers)
        self.inputs.check(layers)

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        device, results = layers[0].weight.device, trainers.make_results()
        loaded = results.load()
        if loaded:
            [part] = loaded
            curve = part["curve"]
            for layer, state in zip(layers, part["states"], strict=True):
                layer.load_state_dict(state)
        else:
            with bypass_inputs(layers):
                first = trainers.for_part("weights")
                curve = self.weights.round_unit(module, layers, dataset, first)
            check_curve(self.weights, curve)
        module.to(device)  # a Trainer leaves its module on the CPU, and so does loading a file

        def make_parts() -> list[dict[str, Any]]:
            return [{"states": [layer.state_dict() for layer in layers], "curve": curve}]

        results.save(make_parts)
        if not any(layer.static_input_fake_quant for layer in layers):
            return curve
        second = self.inputs.round_unit(module, layers, dataset, trainers.for_part("inputs"))
        start = max((int(point["step"]) + 1 for point in curve), default=0)
        return [*curve, *({**point, "step": start + int(point["step"])} for point in second)]
