"""Test that errors are weighed by timestep."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.models.blocks import Unit
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.rounding.adaround import adaround
from fp4dit.rounding.learned import ReconstructionTask
from fp4dit.rounding.timestep_weights import TimestepWeights
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.helpers import tiny


def test_weights_are_interpolated_and_have_a_mean_of_1():
    weigh = TimestepWeights([100, 500, 900], [6.0, 2.0, 1.0])
    timesteps = torch.tensor([0.0, 100.0, 300.0, 500.0, 900.0, 999.0])
    expected = torch.tensor([6.0, 6.0, 4.0, 2.0, 1.0, 1.0]) / 3.0
    torch.testing.assert_close(weigh(timesteps), expected)
    assert TimestepWeights([7], [3.0])(timesteps).tolist() == [1.0] * 6


@pytest.mark.parametrize(("steps", "weights"), [([], []), ([1, 1], [1.0, 1.0]), ([1], [0.0])])
def test_weights_that_make_no_sense_are_refused(steps: list, weights: list[float]):
    with pytest.raises(UserError, match="rising timesteps"):
        TimestepWeights(steps, weights)


def learn(weigh_rows: TimestepWeights | None) -> tuple[ReconstructionTask, Tensor]:
    """Learn a layer from early rows and late rows that excite different inputs.

    Returns:
        The finished task, and the error of the hard weights on the early and on the late rows.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 6, 32, generator=generator)
    x = torch.randn(2, 96, 5, 6, generator=generator) @ mixing[:, None]
    state = {"x": x.flatten(0, 1), "timestep": torch.tensor([900.0, 100.0]).repeat_interleave(96)}
    torch.manual_seed(0)
    linear = nn.Linear(32, 16).requires_grad_(False)
    unit = Unit("", ("x", "timestep"), lambda rows: Call((rows["x"],), {}), ("y",))
    dataset = UnitDataset(unit, state, {"y": linear(state["x"])}, torch.arange(192))
    layer = make_quant_layer(linear, tiny.rules()[1].quantizer).prepare()
    method = tiny.learned_rounding(adaround, steps=150, weigh_rows=weigh_rows)
    task = ReconstructionTask(layer, [layer], dataset, replace(method, warmup=0.1))
    tiny.trainer()(max_steps=method.steps).fit(task)
    layer.commit_weight()
    errors = (layer(state["x"]) - dataset.targets["y"][:]).square().mean((1, 2))
    return task, errors.detach().view(2, 96).mean(1)


def test_learning_favors_the_timesteps_with_large_weights():
    task, errors = learn(TimestepWeights([100, 900], [1.0, 100.0]))
    _, equal = learn(None)
    assert errors[0] < 0.8 * equal[0]
    assert errors[1] > equal[1]
    batch = task.dataset.select(torch.tensor([0, 191]))
    y, target = task.layers[0](batch.rows["x"]), batch.target[0]
    weights = torch.tensor([100.0, 1.0]) / 50.5
    by_hand = ((y - target).square().mean((1, 2)) * weights).mean()
    torch.testing.assert_close(task.compute_error(batch), by_hand)
