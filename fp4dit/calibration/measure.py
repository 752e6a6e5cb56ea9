"""Measure the error of each quantized activation, and of what the transformer predicts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.calibration.activations import ReplayTask, check_all_read
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import RowSources, count_rows, select_rows
from fp4dit.quantization.audit import LayerAudit
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.rules import Rule
from fp4dit.utils.errors import UserError

Predictions = Float[Tensor, "n values"]  # a row for each sample


def thin_values(predictions: Predictions, count: int) -> Float[Tensor, "n kept"]:
    """Return `count` values of each sample at most, at equal distances."""
    return predictions[:, :: -(-predictions.shape[1] // count)]


def compare_predictions(actual: Predictions, expected: Predictions) -> list[float]:
    """Return the sum of the squared errors, and that of the squares."""
    expected = expected.double()
    error = actual.double() - expected
    return [error.square().sum().item(), expected.square().sum().item()]


def divide_sums(errors: Sequence[Sequence[float]]) -> float:
    """Return the relative squared error of all that `compare_predictions` compared."""
    return sum(error for error, _ in errors) / sum(power for _, power in errors)


def compute_call_error(pipeline: Pipeline, outputs: RowSources, target: RowSources) -> float:
    """Return the relative squared error of what a transformer predicts.

    Args:
        pipeline: The pipeline.
        outputs: Outputs of its last unit.
        target: The same in full precision.
    """
    errors = []
    for row in torch.arange(count_rows(target)).split(1):
        pair = (pipeline.read_prediction(select_rows(rows, row)) for rows in (outputs, target))
        errors.append(compare_predictions(*pair))
    return divide_sums(errors)


class PredictTask(ReplayTask):
    """Keeps what the transformer predicts, as a reference for `MeasureTask`.

    Of a large prediction it keeps values at equal distances, so that they fit in memory.

    Args:
        pipeline: The pipeline, in full precision.
        num_values: The largest number of values that are kept of a sample.

    Example:
        >>> task = PredictTask(pipeline)
        >>> trainer.test(task, steps)
        >>> measure = MeasureTask(pipeline, activations, task.predictions)
    """

    def __init__(self, pipeline: Pipeline, num_values: int = 65536) -> None:
        super().__init__(pipeline, {})
        self.num_values = num_values
        self.predictions: list[Tensor] = []

    def on_prediction(self, prediction: Tensor) -> None:
        self.predictions.append(thin_values(prediction, self.num_values).float().cpu())

    def get_progress(self) -> dict[str, Any]:
        return {"predictions": self.predictions}

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        self.predictions = list(progress["predictions"])


class MeasureTask(ReplayTask):
    """Measures the signal-to-quantization-noise ratio of every activation at every timestep.

    Args:
        pipeline: The pipeline.
        activations: The quantizers of the activations, by name.
        predictions: What the transformer predicts in full precision, by `PredictTask`; None does
            not measure the error of whole calls.

    Example:
        >>> task = MeasureTask(pipeline, activations, predictions)
        >>> trainer.test(task, steps)
        >>> task.compute_sqnr()[0]
        {'layer': 'proj_out', 'timestep': 999.0, 'sqnr_db': 31.5}
        >>> task.compute_call_error()
        0.0031
    """

    def __init__(
        self,
        pipeline: Pipeline,
        activations: Mapping[str, FakeQuantize],
        predictions: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(pipeline, activations)
        self.predictions = predictions
        self.errors: list[list[float]] = []  # by `compare_predictions`
        # The sums of squares of the activation and of its quantization error.
        self.power: dict[tuple[str, float], Tensor] = defaultdict(
            lambda: torch.zeros(2, dtype=torch.float64)
        )
        self.shapes: dict[str, torch.Size] = {}

    def on_activation(self, name: str, timestep: float, x: Tensor, out: Tensor) -> None:
        noise = (out.double() - x.double()).square().sum()
        power = torch.stack([x.double().square().sum(), noise]).cpu()
        if not power.isfinite().all():
            raise UserError(
                f"the input of {name} holds NaN or infinity at timestep {timestep:g}: try "
                "model.dtype=float32"
            )
        self.power[name, timestep] += power
        self.shapes[name] = x.shape

    def on_prediction(self, prediction: Tensor) -> None:
        if self.predictions is not None:
            expected = self.predictions[len(self.errors)]
            actual = thin_values(prediction, expected.shape[1]).cpu()
            self.errors.append(compare_predictions(actual, expected))

    def compute_call_error(self) -> float:
        """Return the relative squared error of what the transformer predicts, over all calls."""
        return divide_sums(self.errors)

    def get_progress(self) -> dict[str, Any]:
        return {
            "errors": self.errors,
            "keys": [list(key) for key in self.power],
            "power": list(self.power.values()),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        for (name, timestep), power in zip(progress["keys"], progress["power"], strict=True):
            self.power[name, timestep] = power
        for name, shape in progress["shapes"].items():
            self.shapes[name] = torch.Size(shape)
        self.errors = list(progress["errors"])

    def compute_sqnr(self) -> list[dict[str, str | float]]:
        """Return the ratio of each activation and timestep in dB, as rows of a table."""
        rows = []
        for (name, timestep), power in self.power.items():
            signal, noise = power.tolist()
            ratio = 10 * torch.log10(torch.tensor(signal / noise)).item() if noise else torch.inf
            rows.append({"layer": name, "timestep": timestep, "sqnr_db": round(ratio, 3)})
        return rows

    def audit_activations(self, rules: Mapping[str, Rule]) -> list[LayerAudit]:
        """Return the format and the bits of every activation.

        Raises:
            UserError: if the model never read an activation that is to be quantized.
        """
        check_all_read([name for name in self.activations if name not in self.shapes])
        audits = []
        for name, fake_quant in self.activations.items():
            fmt = fake_quant.quantizer.format
            if fake_quant.calibrated_tensors():
                fmt = fake_quant.format
            rule, shape = rules[name], self.shapes[name]
            bits = rule.bits_per_value(shape)
            audits.append(LayerAudit(name, rule.match, fmt.name, bits, shape.numel()))
        return audits
