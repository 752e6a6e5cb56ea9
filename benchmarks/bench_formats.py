"""Measure how well 4-bit formats fit the shipped weights: `python -m benchmarks.bench_formats`.

The table shows the signal-to-quantization-noise ratio in dB of rounding to nearest in groups of
128, and the excess kurtosis of the groups (0 for a normal, -1.2 for a uniform distribution).
"""

import torch
from diffusers import PixArtTransformer2DModel

from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.utils.hub import resolve_package_path

GROUP = PerGroup(128)
FORMATS = {
    "INT4 asymmetric": Quantizer(integer(4, signed=False), GROUP, MinMax(fp16)),
    "INT4 symmetric": Quantizer(integer(4), GROUP, AbsMax(fp16)),
    "E2M1": Quantizer(floating(2, 1), GROUP, AbsMax(fp16)),
    "E3M0": Quantizer(floating(3, 0), GROUP, AbsMax(fp16)),
}


def main() -> None:
    model = PixArtTransformer2DModel.from_pretrained(
        resolve_package_path("pkg://fp4dit/worlds/shapes/weights"), subfolder="transformer"
    )
    layers = {
        n: m.weight.detach()
        for n, m in model.transformer_blocks.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    first, others = "first linear of the feed-forward", "all other layers of the blocks"
    parts: dict[str, list[torch.Tensor]] = {first: [], others: []}
    for name, weight in layers.items():
        parts[first if name.endswith("ff.net.0.proj") else others].append(weight)
    print(f"{'':34}{'kurtosis':>10}" + "".join(f"{name:>17}" for name in FORMATS))
    for part, weights in parts.items():
        groups = torch.cat([w.reshape(-1, GROUP.size) for w in weights])
        centered = groups - groups.mean(1, keepdim=True)
        kurtosis = (centered**4).mean(1) / (centered**2).mean(1) ** 2 - 3
        row = f"{part:34}{kurtosis.median():>10.2f}"
        for quantizer in FORMATS.values():
            noise = (quantizer(groups) - groups).square().sum()
            row += f"{10 * torch.log10(groups.square().sum() / noise):>17.1f}"
        print(row)


if __name__ == "__main__":
    main()
