"""The context of a model's timestep."""

import pytest
import torch
from torch import Tensor, nn

from fp4dit.quantization.timestep import TimestepContext


class Model(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("by_name", [False, True])
@torch.no_grad()
def test_the_timestep_is_read_by_position_or_name(by_name: bool):
    model, context = Model(), TimestepContext()
    context.attach(model)
    timestep = torch.tensor([7.0, 8.0])
    if by_name:
        model(timestep, timestep=timestep)
    else:
        model(timestep, timestep)
    assert context.timestep.tolist() == [7, 8]
