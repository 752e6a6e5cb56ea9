"""What `pipelines.inspect` prints: layers, unit by unit; what stages take; and what of that would not fit."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from fp4dit import policy
from fp4dit.estimate import Cost
from fp4dit.machine import Machine
from fp4dit.models.base import Pipeline
from fp4dit.policy import Entry
from fp4dit.stream import Unit, within
from pipelines.units import aligned, duration, size

Line = tuple[str, ...]
HEADING = ("layer or operand", "shape", "weight", "bits", "rule", "input", "bits", "rule")
UNTOUCHED = ("16 bit", "", "")
COSTS = ("stage", "time", "GPU memory", "host memory", "disk")


def listed(
    skeleton: Pipeline, seen: Sequence[str], weights: Sequence[Entry], inputs: Sequence[Entry], each: bool
) -> Iterator[str]:
    """A heading and a line for each layer and operand of attention, unit by unit; neighbours that are alike once,
    unless `each` is wanted. `seen` names what can be quantized while it flows."""
    layers = policy.layers(skeleton.dit)
    names = dict.fromkeys([*(name for name in seen if name not in layers), *layers])
    weight, entering = ({e.name: described(e) for e in entries} for entries in (weights, inputs))

    def line(unit: Unit, name: str) -> Line:
        shape = "x".join(map(str, layers[name].weight.shape)) if name in layers else ""  # pyright: ignore
        own = weight.get(name, ("", "", ""))
        return name.removeprefix(f"{unit.module}."), shape, *own, *entering.get(name, UNTOUCHED)

    found = [(unit.module, tuple(line(unit, name) for name in within(names, unit))) for unit in skeleton.units()]
    runs = [[one] for one in found] if each else [list(run) for _, run in groupby(found, key=alike)]
    text = iter(aligned([HEADING, *(line for run in runs for line in run[0][1])]))
    yield f"  {next(text)}"
    for run in runs:
        (first, lines), (last, _) = run[0], run[-1]
        yield first if first == last else f"{first}-{last.removeprefix(stem(last))}"
        yield from (f"  {next(text)}" for _ in lines)


def stem(unit: str) -> str:
    return unit.rstrip("0123456789")


def alike(found: tuple[str, tuple[Line, ...]]) -> tuple[str, tuple[Line, ...]]:
    return stem(found[0]), found[1]


def described(entry: Entry) -> Line:
    return UNTOUCHED if entry.format == "fp16" else (entry.format, f"{entry.bits:.2f}", entry.rule)


def expected(steps: Sequence[str], todo: Sequence[str], costs: Mapping[str, Cost]) -> list[str]:
    """A line for each stage: what is not `todo` costs nothing."""

    def line(name: str) -> Line:
        if name in costs:
            cost = costs[name]
            return name, duration(cost.seconds), size(cost.device), size(cost.host), size(cost.disk)
        return name, "not estimated" if name in todo else "there, or not needed", "", "", ""

    return aligned([COSTS, *map(line, steps)])


def warnings(costs: Mapping[str, Cost], machine: Machine, budget: float, outputs: str) -> Iterator[str]:
    """What would not fit, and which option to change."""
    disk = sum(cost.disk for cost in costs.values())
    if disk > machine.disk:
        yield (
            f"about {size(disk)} of disk are needed, and {size(machine.disk)} are left where outputs={outputs} lies: "
            "give another outputs, or a smaller calibration.trained or calibration.timesteps"
        )
    if budget > machine.host:
        yield f"memory_budget_gb={budget / 1e9:g} is more than the {size(machine.host)} of memory: give a smaller one"
    for name, cost in costs.items():
        if cost.host > machine.host:
            yield (
                f"{name} needs about {size(cost.host)} of host memory, and there are {size(machine.host)}: "
                f"give a smaller {cost.lower}" + (" or memory_budget_gb" if cost.data else "")
            )
        if machine.own is not None and cost.device > machine.own:
            yield (
                f"{name} needs about {size(cost.device)} of GPU memory, and there are {size(machine.own)}: "
                f"give a smaller {cost.lower}"
            )
        if budget < cost.data < machine.host - cost.host + budget:
            yield (
                f"of the {size(cost.data)} of calibration data of {name}, what exceeds memory_budget_gb="
                f"{budget / 1e9:g} will lie in files: there is memory for a larger budget, which is faster"
            )
