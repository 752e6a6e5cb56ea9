"""Estimates of time and memory: their table, and warnings about what would not fit."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fp4dit.utils.errors import UserError
from fp4dit.utils.formatting import align_columns, format_bytes, format_duration
from pipelines.runtime.trainer import Runtime

if TYPE_CHECKING:
    from fp4dit.estimate.machine import Machine
    from fp4dit.estimate.stages import Estimator, StageCost
    from pipelines.stages.base import Stage

COST_HEADING = ("stage", "time", "GPU memory", "host memory", "disk")


def make_estimator(cfg: DictConfig, generate: Any) -> "Estimator":
    """Return an estimator for this machine.

    Args:
        cfg: The config of a run.
        generate: The stage object that generates the images, whose model is estimated.
    """
    # Imported here because a dry run whose results are all in the store needs no torch.
    from fp4dit.estimate.footprint import measure_footprint
    from fp4dit.estimate.machine import Machine
    from fp4dit.estimate.stages import Estimator

    skeleton = generate.model.build_on_meta()  # its own, because measuring it replaces layers
    dtype: Any = skeleton.transformer.dtype
    machine = Machine.detect(choose_device(Runtime.from_config(cfg)), dtype, Path(cfg.outputs))
    footprint = measure_footprint(skeleton, generate.weight)
    return Estimator(footprint, machine, 1e9 * cfg.memory_budget_gb, dtype)


def choose_device(runtime: Runtime) -> Any:
    """Return the torch.device of the runtime, or the CPU with a warning if it is not available."""
    try:
        return runtime.device
    except UserError as error:
        print(f"warning: {error}. Estimated for the CPU", file=sys.stderr)
        return Runtime({"accelerator": "cpu", "devices": 1}).device


def collect_costs(
    stages: Mapping[str, "Stage"], make_estimator: "Callable[[], Estimator]"
) -> dict[str, "StageCost"]:
    """Return what each stage takes, by name, without the stages that cannot be estimated."""
    costs = {}
    for name, stage in stages.items():
        if cost := stage.estimate_cost(make_estimator):
            costs[name] = cost
    return costs


def format_costs(
    stages: Sequence[str], pending: Sequence[str], costs: Mapping[str, "StageCost"]
) -> list[str]:
    """Return a heading, and a line with the estimate of each stage.

    Args:
        stages: The names of all stages.
        pending: The names of the stages that would run.
        costs: The estimates by stage. Some stages have none.
    """
    lines: list[tuple[str, ...]] = [COST_HEADING]
    for name in stages:
        if name in costs:
            cost = costs[name]
            lines.append((name, format_duration(cost.seconds), *format_sizes(cost)))
        else:
            text = "not estimated" if name in pending else "in the store, or not needed"
            lines.append((name, text, "", "", ""))
    return align_columns(lines)


def format_sizes(cost: "StageCost") -> tuple[str, str, str]:
    """Return the cells of device memory, host memory and disk."""
    device, host = format_bytes(cost.device_bytes), format_bytes(cost.host_bytes)
    return device, host, format_bytes(cost.disk_bytes)


def list_cost_warnings(
    costs: Mapping[str, "StageCost"], machine: "Machine", budget: float, outputs: str
) -> Iterator[str]:
    """Yield a warning, with the option to change, for each resource that is too small.

    Args:
        costs: The estimates by stage.
        machine: The machine that the stages would run on.
        budget: Host memory for calibration data, in bytes.
        outputs: The folder of the results.
    """
    disk = sum(cost.disk_bytes for cost in costs.values())
    if disk > machine.disk_bytes:
        yield (
            f"about {format_bytes(disk)} of disk are needed, and "
            f"{format_bytes(machine.disk_bytes)} are left at outputs={outputs}: give another "
            "outputs, or a smaller calibration.num_prompts or calibration.timesteps"
        )
    if budget > machine.host_bytes:
        yield (
            f"memory_budget_gb={budget / 1e9:g} is more than the "
            f"{format_bytes(machine.host_bytes)} of memory: give a smaller one"
        )
    for name, cost in costs.items():
        yield from _list_stage_warnings(name, cost, machine, budget)


def warn_of_slow_dtype(machine: "Machine", dtype: Any) -> Iterator[str]:
    """Yield a warning if the machine multiplies fp32 at least twice as fast as the model's dtype.

    Processors without 16-bit products emulate them, up to a hundred times slower.

    Args:
        machine: The machine, measured in `dtype`.
        dtype: The torch.dtype of the model.
    """
    from fp4dit.estimate.machine import compare_with_fp32

    factor = compare_with_fp32(machine, dtype)
    if factor >= 2:
        yield (
            f"a matrix product in {dtype} takes {factor:.0f} times as long on this "
            f"{machine.device} as in torch.float32: give model.dtype=float32"
        )


def _list_stage_warnings(
    name: str, cost: "StageCost", machine: "Machine", budget: float
) -> Iterator[str]:
    if cost.host_bytes > machine.host_bytes:
        other = " or memory_budget_gb" if cost.data_bytes else ""
        yield (
            f"{name} needs about {format_bytes(cost.host_bytes)} of host memory, and there are "
            f"{format_bytes(machine.host_bytes)}: give a smaller {cost.memory_option}{other}"
        )
    if machine.device_bytes is not None and cost.device_bytes > machine.device_bytes:
        yield (
            f"{name} needs about {format_bytes(cost.device_bytes)} of GPU memory, and there are "
            f"{format_bytes(machine.device_bytes)}: give a smaller {cost.memory_option}"
        )
    # `cost.host_bytes` counts data up to the budget, which is therefore added to what is left.
    if budget < cost.data_bytes < machine.host_bytes - cost.host_bytes + budget:
        yield (
            f"of the {format_bytes(cost.data_bytes)} of calibration data of {name}, the part above "
            f"memory_budget_gb={budget / 1e9:g} will be in files: there is memory for a larger "
            "budget, which is faster"
        )
