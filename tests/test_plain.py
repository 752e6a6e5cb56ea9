"""The plain reference that ours is measured beside learns the same: loss and gradients of a step."""

import copy
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.adaround import CPU, block, example, examples
from fp4dit import policy
from fp4dit.examples import Examples
from fp4dit.formats import floating
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.rounding import ulp
from fp4dit.tasks.reconstruct import BlockReconstructor, Learnt, Summed

WIDTH = 128
GROUPS = [Rule("*", Quantizer(floating(2, 1), Granularity("group", 32)))]
SAME = {"rtol": 1e-3, "atol": 1e-9}


@pytest.fixture
def given() -> tuple[nn.Module, Examples]:
    torch.manual_seed(0)
    module = block(WIDTH)
    return module, examples(module, WIDTH, tokens=16, batch=2)


def ours(module: nn.Module, given: Examples) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the first step, its roundings already pressed to decide."""
    layers = policy.quantize_weights_(module, policy.assign(policy.layers(module), GROUPS))
    for layer in layers.values():
        layer.prepare()
    plan = Learnt(ulp, partial(torch.optim.Adam, lr=1e-3), Summed(), 1, 2, warmup=0.0)
    task = BlockReconstructor(module, list(layers.values()), given, plan)
    loss = task.training_step(given.at(torch.arange(2)), 0)
    loss.backward()
    return loss, [r.v.grad for r in task.choices]  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def test_loss_and_gradients_of_the_first_step(given: tuple[nn.Module, Examples]):
    module, data = given
    loss, gradients = ours(copy.deepcopy(module), data)
    layers = plain.round_(module, group=32)
    call, target = example(data, 2, CPU)
    expected = (call(module) - target).square().sum(1).mean() + 0.01 * plain.indecision(layers, 20.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for layer, gradient in zip(layers, gradients, strict=True):
        # Theirs rounds up and ours away from zero, so a negative weight's has the other sign. The largest weight of a
        # group has no choice with us; with them it has one below, and none above.
        inside = layer.blocks.detach().abs() < 0.999 * layer.limit
        found = gradient * layer.blocks.detach().sign()
        torch.testing.assert_close(found[inside], layer.v.grad[inside], **SAME)  # pyright: ignore[reportOptionalSubscript]


def test_it_learns(given: tuple[nn.Module, Examples]):
    module, data = given
    layers = plain.round_(module, group=32)
    before = [layer.v.detach().clone() for layer in layers]
    losses = plain.fit(module, layers, repeat(example(data, 2, CPU)), steps=10, lr=1e-2)
    assert losses[-1] < losses[3]  # the first two steps have no regulariser
    assert all(not torch.equal(layer.v, start) for layer, start in zip(layers, before, strict=True))
