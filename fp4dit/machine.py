"""What the machine at hand has and does, measured where nobody says it."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp4dit.grid import Grid
from fp4dit.policy import Rule


@dataclass(frozen=True)
class Machine:
    """Bytes of the host's memory, of the disk left, and of the memory of `device`, None if that is the host; and the
    operations that a product of large matrices does per second there."""

    device: torch.device
    speed: float
    host: int
    disk: int
    own: int | None

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype, folder: Path) -> "Machine":
        """With the disk that `folder` is, or would be, on."""
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        own = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(device, speed(device, dtype), host, shutil.disk_usage(there).free, own)


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of matrices, a multiplication and an addition being two."""
    side = 512 if device.type == "cpu" else 8192
    x = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / seconds(lambda: x @ x, device)


def quantizing(rule: Rule, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that a grid of this activation rule takes for a value, in a tensor of this shape."""
    x = torch.randn(shape, device=device).to(dtype)
    assert rule.quantizer is not None
    grid = Grid(rule.quantizer)
    if rule.observe:
        grid.measure(rule.observe.gather([rule.observe.note(x.flatten(0, -2)[None])]))
    return seconds(lambda: grid(x), device) / x.numel()


@torch.no_grad()
def seconds(work: Callable[[], Tensor], device: torch.device, least: float = 0.1) -> float:
    """The shortest of the times that `work` took, begun again until `least` seconds are over."""
    found, end = [], time.perf_counter() + least
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)
