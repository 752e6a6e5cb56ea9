"""Several ways to do one thing, timed in turn, so that what else the machine does meets all of them."""

from collections.abc import Callable, Mapping
from statistics import median

import torch

from benchmarks.adaround import now

Ways = Mapping[str, Callable[[], object]]


def in_turn(ways: Ways, repeats: int, device: torch.device, calls: int = 1) -> dict[str, list[float]]:
    """Milliseconds of a call, for each repeat of so many calls; a first round, which also compiles, is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1 + repeats):
        for name, way in ways.items():
            began = now(device)
            for _ in range(calls):
                way()
            if repeat:
                found[name].append(1000 * (now(device) - began) / calls)
    return found


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(own) for name, own in times.items()}
