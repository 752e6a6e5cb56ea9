"""Seconds and memory of GPTQ on one layer of PixArt's feed-forward: `python -m benchmarks.gptq`.

A weight of 1152 x 4608 in groups of 16, and the inputs' second moment from 8192 correlated tokens. The peak is the
process's: subtract what is printed for the start.
"""

import resource
import time

import torch

from fp4dit.formats import floating
from fp4dit.gptq import as_given, gptq, largest_first
from fp4dit.quantizer import Granularity, Quantizer

OUT, IN, TOKENS = 1152, 4608, 8192


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=g) * torch.logspace(0, -2, IN)[:, None]
    x = torch.randn(TOKENS, IN, generator=g) @ mixing
    weight = torch.randn(OUT, IN, generator=g) * 0.02
    quantizer = Quantizer(floating(2, 1), Granularity("group", 16))
    scaling = quantizer.scaling(weight)
    del mixing
    began = time.perf_counter()
    hessian = x.T @ x
    print(f"{TOKENS} tokens summed in {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads")
    signal = ((weight @ hessian) * weight).sum()
    error = lambda hard: (((hard - weight) @ hessian) * (hard - weight)).sum() / signal
    print(f"{'nearest':24} error {error(quantizer(weight, scaling)):.5f}  peak {peak():.0f} MiB at the start")
    for order in (as_given, largest_first):
        for block in (32, 128, 512):
            began = time.perf_counter()
            hard = gptq(weight, hessian, scaling, quantizer.format, block=block, order=order)
            seconds = time.perf_counter() - began
            label = f"{order.__name__}, block {block}"
            print(f"{label:24} error {error(hard):.5f}  {seconds:5.1f} s  peak {peak():.0f} MiB")


if __name__ == "__main__":
    main()
