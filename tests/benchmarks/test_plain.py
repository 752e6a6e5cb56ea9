"""The reference implementation of AdaRound in the benchmarks has our loss and gradients."""

import copy
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.adaround import CPU, make_block, make_dataset, select_example
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.numerics.formats import floating
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.quantization import apply, rules
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.adaround import adaround_scale_aware
from fp4dit.rounding.learned import LearnedRounding, ReconstructionTask
from fp4dit.rounding.objectives import RelativeMSE

WIDTH = 128
GROUPS = [Rule("*", Quantizer(floating(2, 1), PerGroup(32)))]


class SummedError(RelativeMSE):
    """Error summed over the tokens, plus the summed rounding loss, as FP4DiT's authors have it."""

    def error(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
        return (output[0] - target[0]).square().sum(1).mean()

    def __call__(
        self, error: Tensor, rtn_error: Tensor, rounding_loss: Tensor | float, count: int
    ) -> Tensor:
        return error + 0.01 * rounding_loss


TOLERANCE = {"rtol": 1e-3, "atol": 1e-9}


@pytest.fixture
def block_and_dataset() -> tuple[nn.Module, UnitDataset]:
    torch.manual_seed(0)
    module = make_block(WIDTH)
    return module, make_dataset(module, WIDTH, tokens=16, batch=2)


def compute_loss_and_gradients(
    module: nn.Module, dataset: UnitDataset
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients of our first step, which has a rounding loss already."""
    layers = apply.quantize_weights_(module, rules.assign_rules(rules.find_layers(module), GROUPS))
    for layer in layers.values():
        layer.prepare()
    method = LearnedRounding(
        adaround_scale_aware, partial(torch.optim.Adam, lr=1e-3), SummedError(), 1, 2, warmup=0.0
    )
    task = ReconstructionTask(module, list(layers.values()), dataset, method)
    loss = task.training_step(dataset.select(torch.arange(2)), 0)
    loss.backward()
    return loss, [r.v.grad for r in task.learnable_roundings]  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def test_loss_and_gradients_of_the_first_step(block_and_dataset: tuple[nn.Module, UnitDataset]):
    module, dataset = block_and_dataset
    loss, gradients = compute_loss_and_gradients(copy.deepcopy(module), dataset)
    layers = plain.wrap_linear_layers_(module, group=32)
    call, target = select_example(dataset, 2, CPU)
    error = (call(module) - target).square().sum(1).mean()
    expected = error + 0.01 * plain.rounding_loss(layers, 20.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for layer, gradient in zip(layers, gradients, strict=True):
        # Theirs rounds up and ours away from zero, so gradients of negative weights have opposite
        # signs. The largest weight of a group has one candidate here; theirs has another below.
        inside = layer.blocks.detach().abs() < 0.999 * layer.limit
        signed = gradient * layer.blocks.detach().sign()
        torch.testing.assert_close(signed[inside], layer.v.grad[inside], **TOLERANCE)  # pyright: ignore[reportOptionalSubscript]


def test_the_reference_implementation_learns(block_and_dataset: tuple[nn.Module, UnitDataset]):
    module, dataset = block_and_dataset
    layers = plain.wrap_linear_layers_(module, group=32)
    before = [layer.v.detach().clone() for layer in layers]
    examples = repeat(select_example(dataset, 2, CPU))
    losses = plain.fit_roundings(module, layers, examples, steps=10, lr=1e-2)
    assert losses[-1] < losses[3]  # the first two steps have no rounding loss
    assert all(not torch.equal(layer.v, start) for layer, start in zip(layers, before, strict=True))
