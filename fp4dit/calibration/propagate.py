"""Propagation of activations through a model, unit by unit.

The reconstruction of a unit needs its inputs in the quantized model and its outputs in the original
one. Both models are propagated side by side over all calibration calls, which takes two passes over
the data for a model of any depth.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fp4dit.calibration.saved_rows import SavedRows
from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.data.segments import Columns, add_rows, find_stops, iter_batches, iter_slices
from fp4dit.models.blocks import (
    ReadOnlyState,
    RowSources,
    Unit,
    count_rows,
    to_device,
)
from fp4dit.models.nan_guard import nonfinite_error
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.utils.calls import Call


def with_timestep(unit: Unit, context: TimestepContext) -> Unit:
    """Return a unit whose calls set the timestep in `context` before they run its module."""

    def make_call(state: ReadOnlyState) -> TimestepCall:
        call = unit.make_call(state)
        return TimestepCall(call.args, call.kwargs, call, context, state["timestep"])

    return replace(unit, inputs=(*unit.inputs, "timestep"), make_call=make_call)


@dataclass(frozen=True)
class TimestepCall(Call):
    """Call of a part of a model that sets the timestep first.

    Args:
        args: Positional arguments of `call`.
        kwargs: Keyword arguments of `call`.
        call: Call of the part, which is made after the timestep is set.
        context: Context that holds the timestep.
        timestep: Timestep of each row.

    Example:
        >>> call = Call((hidden,), {})
        >>> timed = TimestepCall(call.args, call.kwargs, call, context, torch.tensor([500, 20]))
        >>> output = timed(block)
    """

    call: Call
    context: TimestepContext
    timestep: Tensor

    def __call__(self, module: nn.Module) -> Any:
        self.context.update(self.timestep)
        return self.call(module)


@torch.no_grad()
def propagate_unit(
    module: nn.Module,
    unit: Unit,
    columns: RowSources,
    batch_size: int,
    device: torch.device | str,
    memory: MemoryBudget | None = None,
    progress: Callable[[list[slice]], Iterable[slice]] = iter,
    saved: SavedRows | None = None,
) -> dict[str, RowSource]:
    """Compute the outputs of a unit for every row.

    Args:
        module: The unit's module, of the original or of the quantized model.
        unit: The unit.
        columns: The activations of all rows.
        batch_size: The number of rows of one forward pass.
        device: The device of `module`.
        memory: The budget for the outputs. Outputs that exceed it lie in files.
        progress: Wraps the list of the batches, for example in a progress bar.
        saved: The rows that a killed run has computed. Further rows are added while they are
            computed.

    Raises:
        UserError: if an output is NaN or infinite.
    """
    memory, stops = memory or MemoryBudget(), find_stops(columns)
    outputs: Columns = {}
    first = 0
    if saved is not None:
        outputs, first = saved.load(stops, memory)
    for index in progress(list(iter_slices(stops, first, batch_size))):
        call = unit.make_call(to_device(device, unit.select_inputs(columns, index)))
        values = unit.read_outputs(call(module), index.stop - index.start)
        for name, output in zip(unit.outputs, values, strict=True):
            is_bad = ~output.isfinite().flatten(1).all(1)  # for each row
            if is_bad.any():
                timestep = columns["timestep"][index][is_bad.cpu()][0]
                raise nonfinite_error(unit.label, float(timestep))
            add_rows(outputs, name, index.start, output.cpu(), stops, memory)
        if saved is not None:
            saved.save_if_due(outputs, index.stop)
    return {**outputs}


def compute_relative_error(
    outputs: RowSources, targets: RowSources, index: Int[Tensor, "n"] | None = None, size: int = 64
) -> float:
    """Compute |output - target|^2 / |target|^2 in fp64.

    Args:
        outputs: The outputs of a unit.
        targets: The outputs to compare with.
        index: The numbers of the rows; None for all.
        size: The number of rows that are read at a time.
    """
    index = torch.arange(count_rows(targets)) if index is None else index
    noise = signal = 0.0
    for name, column in targets.items():
        for batch in iter_batches(targets, index, size):
            target = column[batch].double()
            noise += (outputs[name][batch].double() - target).square().sum().item()
            signal += target.square().sum().item()
    return noise / signal
