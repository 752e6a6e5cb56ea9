"""Test the recording of calls of a module."""

import torch
from torch import nn

from fp4dit.utils.calls import record_calls


def test_calls_are_recorded_inside_the_block_only():
    class Adder(nn.Module):
        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            return x + y

    module, x, y = Adder(), torch.randn(3), torch.randn(3)
    with record_calls(module) as calls:
        module(x, y=y)
        module(y, y=x)
    module(x, y=y)
    assert [(call.args, call.kwargs) for call in calls] == [((x,), {"y": y}), ((y,), {"y": x})]
    assert torch.equal(calls[0](module), x + y)
