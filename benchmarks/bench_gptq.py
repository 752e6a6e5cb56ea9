"""Measure time and memory of GPTQ on a layer of PixArt's feed-forward.

Run `python -m benchmarks.bench_gptq`. The weight is 1152 x 4608 in groups of 16, and the inputs'
second moment comes from 8192 correlated tokens. The peak is that of the process: subtract the one
that is printed at the start.
"""

import resource
import time

import torch

from fp4dit.numerics.formats import floating
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.rounding.gptq_columns import activation_order, natural_order, quantize_with_gptq

OUT, IN, TOKENS = 1152, 4608, 8192


def process_peak_mib() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=g) * torch.logspace(0, -2, IN)[:, None]
    x = torch.randn(TOKENS, IN, generator=g) @ mixing
    weight = torch.randn(OUT, IN, generator=g) * 0.02
    quantizer = Quantizer(floating(2, 1), PerGroup(16))
    qparams = quantizer.compute_qparams(weight)
    del mixing
    start = time.perf_counter()
    hessian = x.T @ x
    print(
        f"{TOKENS} tokens summed in {time.perf_counter() - start:.1f} s, "
        f"{torch.get_num_threads()} threads"
    )
    signal = ((weight @ hessian) * weight).sum()

    def relative_error(hard: torch.Tensor) -> torch.Tensor:
        return (((hard - weight) @ hessian) * (hard - weight)).sum() / signal

    error = relative_error(quantizer(weight, qparams))
    print(f"{'nearest':24} error {error:.5f}  peak {process_peak_mib():.0f} MiB at the start")
    for order in (natural_order, activation_order):
        for block_size in (32, 128, 512):
            start = time.perf_counter()
            hard = quantize_with_gptq(
                weight, hessian, qparams, quantizer.format, block_size=block_size, order=order
            )
            seconds = time.perf_counter() - start
            label, peak = f"{order.__name__}, block {block_size}", process_peak_mib()
            error = relative_error(hard)
            print(f"{label:24} error {error:.5f}  {seconds:5.1f} s  peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
