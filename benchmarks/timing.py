"""Several ways to do one thing, timed in turn, so that what else the machine does meets all of them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch

from benchmarks.adaround import now

Ways = Mapping[str, Callable[[], object]]


def in_turn(ways: Ways, repeats: int, device: torch.device, calls: int = 1) -> dict[str, list[float]]:
    """Milliseconds of a call, for each repeat of so many calls; a first round, which also compiles, is not counted.

    On a CPU it is the time of its cores, so that other programs on the machine count for little.
    """
    clock = now if device.type == "cuda" else lambda _: time.process_time()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1 + repeats):
        for name, way in ways.items():
            began = clock(device)
            for _ in range(calls):
                way()
            if repeat:
                found[name].append(1000 * (clock(device) - began) / calls)
    return found


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(own) for name, own in times.items()}


def resident() -> float:
    """MiB of this process at most. What getrusage says starts at what its parent had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) / 1024
