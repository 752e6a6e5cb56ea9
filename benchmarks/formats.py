"""How well each 4-bit format fits the shipped weights, before anything is learnt: `python -m benchmarks.formats`.

Signal-to-quantization-noise ratio in dB of round-to-nearest in groups of 128, and the excess kurtosis of the groups
(0 for a normal distribution, -1.2 for a uniform one).
"""

import torch
from diffusers import PixArtTransformer2DModel

from fp4dit.formats import floating, fp16, integer
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.resources import locate
from fp4dit.scales import AbsMax, MinMax

GROUP = Granularity("group", 128)
FORMATS = {
    "INT4 asymmetric": Quantizer(integer(4, signed=False), GROUP, MinMax(fp16)),
    "INT4 symmetric": Quantizer(integer(4), GROUP, AbsMax(fp16)),
    "E2M1": Quantizer(floating(2, 1), GROUP, AbsMax(fp16)),
    "E3M0": Quantizer(floating(3, 0), GROUP, AbsMax(fp16)),
}


def main() -> None:
    model = PixArtTransformer2DModel.from_pretrained(
        locate("pkg://fp4dit.models.shapes/weights"), subfolder="transformer"
    )
    layers = {
        n: m.weight.detach() for n, m in model.transformer_blocks.named_modules() if isinstance(m, torch.nn.Linear)
    }
    parts = {
        "first linear of the feed-forward": [w for n, w in layers.items() if n.endswith("ff.net.0.proj")],
        "all other layers of the blocks": [w for n, w in layers.items() if not n.endswith("ff.net.0.proj")],
    }
    print(f"{'':34}{'kurtosis':>10}" + "".join(f"{name:>17}" for name in FORMATS))
    for part, weights in parts.items():
        groups = torch.cat([w.reshape(-1, GROUP.group) for w in weights])
        centred = groups - groups.mean(1, keepdim=True)
        kurtosis = (centred**4).mean(1) / (centred**2).mean(1) ** 2 - 3
        ratios = [
            10 * torch.log10(groups.square().sum() / (q(groups) - groups).square().sum()) for q in FORMATS.values()
        ]
        print(f"{part:34}{kurtosis.median():>10.2f}" + "".join(f"{ratio:>17.1f}" for ratio in ratios))


if __name__ == "__main__":
    main()
