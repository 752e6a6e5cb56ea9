"""Divide the time of a call among kinds of kernels, by the names of the kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Shares = Mapping[str, float]

PARTS: Mapping[str, Sequence[str]] = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": (
        "gemm",
        "nvjet",
        "cutlass",
        "cublas",
        "wgmma",
        "matmul",
        "addmm",
        "_mm",
        "::mm",
        "convolution",
    ),
    "norms": ("norm",),
    "quantization": ("quantize_row", "amax", "float8", "fp8", "round", "clamp"),
}
REST = "all else"
# Kernels of a compiler, whose names contain the operations around them, too.
FUSED = ("triton_poi", "triton_red", "triton_per")


def classify_kernel(kernel: str) -> str:
    """Return the first kind that the name of a kernel contains a word of."""
    name = kernel.lower()
    kinds = ("norms", "quantization") if name.startswith(FUSED) else tuple(PARTS)
    for kind in kinds:
        if any(word in name for word in PARTS[kind]):
            return kind
    return REST


@torch.no_grad()
def profile_shares(call: Callable[[], object], device: torch.device) -> Shares:
    """Profile a call, and return the share of each kind of kernel in the time.

    On a CPU the time is that of operators.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
    times: dict[str, float] = dict.fromkeys((*PARTS, REST), 0.0)
    events: Any = profiler.key_averages()
    for event in events:
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[classify_kernel(event.key)] += time
    total = sum(times.values())
    return {name: time / total for name, time in times.items()}
