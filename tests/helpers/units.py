"""Run the units of a model, and compare them with the model."""

from typing import Any

import torch
from torch import nn

from fp4dit.models.blocks import ActivationState, Unit
from fp4dit.models.tracing import record_parts
from fp4dit.utils.calls import Call


def run_unit(unit: Unit, state: ActivationState, index: Any, model: nn.Module) -> tuple:
    """Return the outputs of a unit on some rows of the state."""
    call = unit.make_call(unit.select_inputs(state, index))
    return unit.read_outputs(call(model.get_submodule(unit.module)), len(state["timestep"][index]))


@torch.no_grad()
def check_parts(adapter: Any, call: Call) -> None:
    """Check that the units compute what the parts of the transformer compute in a call."""
    adapter.units()
    for _, state in adapter.read_states(call):
        kind_call = adapter.kinds[int(state["call_kind"][0])].make_call(state)
        outputs = record_parts(adapter.transformer, kind_call, adapter.parts)
        for unit, expected in zip(adapter.units(), outputs.values(), strict=True):
            rows = run_unit(unit, state, slice(None), adapter.transformer)
            count = len(state["timestep"])
            assert all(map(torch.equal, rows, unit.read_outputs(expected, count)))
            state = state | dict(zip(unit.outputs, rows, strict=True))
    assert adapter.parts != {""}
