"""Calibration data: calls of the transformer along denoising trajectories.

`capture` records calls, and `captured_calls` writes and reads their files. `propagate` computes the
activations unit by unit, `dataset` holds the data of one unit, and `layer_inputs` yields the inputs
of its layers. `activations` calibrates static quantizers, `measure` measures errors, and
`histograms` counts values on their grids.
"""

from fp4dit.calibration.activations import ObserveTask
from fp4dit.calibration.capture import CaptureTask, PromptBatch, noise_at_index
from fp4dit.calibration.dataset import UnitBatch, UnitBatches, UnitDataset
from fp4dit.calibration.histograms import HistogramTask
from fp4dit.calibration.measure import MeasureTask, PredictTask

__all__ = [
    "CaptureTask",
    "HistogramTask",
    "MeasureTask",
    "ObserveTask",
    "PredictTask",
    "PromptBatch",
    "UnitBatch",
    "UnitBatches",
    "UnitDataset",
    "noise_at_index",
]
