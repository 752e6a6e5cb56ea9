"""Time calls in turn, so that other load of the machine affects all of them, and print tables."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.adaround import synchronized_time

Calls = Mapping[str, Callable[[], object]]


def time_in_turn(
    calls: Calls, repeats: int, device: torch.device, count: int = 1
) -> dict[str, list[float]]:
    """Time calls in turn, and return the milliseconds of one call for each repeat, by name.

    A first round, which may compile, is not counted. On a CPU the time is that of its cores, so
    that other programs on the machine hardly matter.

    Args:
        count: calls that are timed as one.
    """
    clock = synchronized_time if device.type == "cuda" else lambda _: time.process_time()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(1 + repeats):
        for name, call in calls.items():
            began = clock(device)
            for _ in range(count):
                call()
            if repeat:
                times[name].append(1000 * (clock(device) - began) / count)
    return times


def compute_medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each list."""
    return {name: median(values) for name, values in times.items()}


def count_tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a module, saved or not."""
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


def peak_memory_mib() -> float:
    """Return the peak of this process's memory in MiB.

    That of `getrusage` includes the memory that the parent process had.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) / 1024


def get_device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the vector instructions of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def format_row(*cells: str) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def format_header(*columns: str) -> Iterator[str]:
    """Yield the two header lines of a Markdown table. All columns but the first are numbers."""
    yield format_row(*columns)
    yield "|---|" + "---:|" * (len(columns) - 1)
