"""Memory, disk space and speed of this machine."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.rules import Rule


@dataclass(frozen=True)
class Machine:
    """The capacity of a machine, and the speed of one of its devices.

    Attributes:
        device: The device.
        flops_per_second: The operations per second of a matmul of large matrices on the device.
        host_bytes: The host's memory.
        disk_bytes: The free space of the disk.
        device_bytes: The device's memory; None if the device is the host.

    Example:
        >>> machine = Machine.detect(torch.device("cpu"), torch.float32, Path("outputs"))
    """

    device: torch.device
    flops_per_second: float
    host_bytes: int
    disk_bytes: int
    device_bytes: int | None

    @classmethod
    def detect(cls, device: torch.device, dtype: torch.dtype, folder: Path) -> "Machine":
        """Measure this machine, with the disk of `folder`, which need not exist."""
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        device_bytes = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
        host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        disk_bytes = shutil.disk_usage(existing).free
        speed = measure_matmul_speed(device, dtype)
        return cls(device, speed, host_bytes, disk_bytes, device_bytes)


def measure_matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a matmul; a multiplication and an addition are two."""
    side = 512 if device.type == "cpu" else 8192
    x = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / time_fastest_call(lambda: x @ x, device)


def compare_with_fp32(machine: Machine, dtype: torch.dtype) -> float:
    """Return how many times as fast as in `dtype` a machine that was measured in it is in fp32."""
    if dtype == torch.float32:
        return 1.0
    return measure_matmul_speed(machine.device, torch.float32) / machine.flops_per_second


def measure_quantize_seconds(
    rule: Rule, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the seconds per value that the quantizer of an activation rule takes.

    Args:
        rule: A rule with a quantizer.
        shape: The shape of the activation.
        device: The device.
        dtype: The data type of the activation.
    """
    x = torch.randn(shape, device=device).to(dtype)
    assert rule.quantizer is not None
    fake_quant = FakeQuantize(rule.quantizer)
    if rule.observer:
        summary = rule.observer.summarize(x.flatten(0, -2)[None])
        fake_quant.calibrate(rule.observer.merge([summary]))
    return time_fastest_call(lambda: fake_quant(x), device) / x.numel()


@torch.no_grad()
def time_fastest_call(
    function: Callable[[], Tensor], device: torch.device, min_seconds: float = 0.1
) -> float:
    """Return the seconds of the fastest of several calls.

    Args:
        function: The function to call, at least three times.
        device: The device that it computes on.
        min_seconds: The least time over which calls are repeated.
    """
    times, end = [], time.perf_counter() + min_seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
