"""How long products with packed weights take: what was measured, on which device."""

import json
from functools import lru_cache
from importlib import resources
from math import log2
from typing import NamedTuple

import torch


class Speed(NamedTuple):
    """Milliseconds of m rows times a weight of o rows of k values; `backend` is one of `matmul`, or "16-bit"."""

    device: str
    backend: str
    m: int
    o: int
    k: int
    ms: float


@lru_cache
def measured() -> tuple[Speed, ...]:
    """What `python -m benchmarks.packed` found on the devices that it was run on."""
    return tuple(Speed(*row) for row in json.loads((resources.files("fp4dit.packed") / "speeds.json").read_text()))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


@lru_cache
def milliseconds(device: str, backend: str, m: int, o: int, k: int) -> float | None:
    """Of the shape most like this one that was measured there, as if time went by size; None if there is none."""
    there = [speed for speed in measured() if (speed.device, speed.backend) == (device, backend)]
    if not there:
        return None
    distance = lambda s: abs(log2(s.m / m)) + abs(log2(s.o / o)) + abs(log2(s.k / k))
    nearest = min(there, key=distance)
    return nearest.ms * (m * o * k) / (nearest.m * nearest.o * nearest.k)
