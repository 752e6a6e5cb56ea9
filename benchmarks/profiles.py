"""What a call's time goes into, by the names of its kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Shares = Mapping[str, float]

PARTS: Mapping[str, Sequence[str]] = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "wgmma", "product", "addmm", "_mm", "::mm", "convolution"),
    "norms": ("norm",),
    "quantization": ("quantized_row", "amax", "float8", "fp8", "round", "clamp"),
}
REST = "all else"
FUSED = ("triton_poi", "triton_red", "triton_per")  # a compiler's: named after what is around them, too


def part(kernel: str) -> str:
    """The first of which the name has a word."""
    name = kernel.lower()
    able = ("norms", "quantization") if name.startswith(FUSED) else tuple(PARTS)
    return next((part for part in able if any(word in name for word in PARTS[part])), REST)


@torch.no_grad()
def shares(call: Callable[[], object], device: torch.device) -> Shares:
    """Of the time that the device's kernels, or on a CPU its operators, take in one call."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        call()
    taken: dict[str, float] = dict.fromkeys((*PARTS, REST), 0.0)
    events: Any = found.key_averages()
    for event in events:
        taken[part(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(taken.values())
    return {name: time / total for name, time in taken.items()}
