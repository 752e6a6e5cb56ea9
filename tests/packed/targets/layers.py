"""Random packed layers of all kinds, for all targets."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from random import Random

import torch
from torch import nn

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.formats import Format, floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerTensor, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, Target
from fp4dit.transforms.base import TransformSpec
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer

BF16 = floating(8, 7, reserved=2**7)

SIGNED = [
    floating(2, 1),
    floating(3, 0),
    floating(1, 2),
    floating(2, 3),
    floating(4, 3),
    floating(4, 3, reserved=1),
    floating(5, 2, reserved=4),
    floating(3, 4),
    integer(4),
    integer(8),
    integer(3),
    nf4,
]
UNSIGNED = [integer(4, signed=False), integer(8, signed=False)]
SCALES = [AbsMax(), AbsMax(fp16), AbsMax(BF16), E8M0Scale(), NVFP4Scale()]
GRANULARITIES = [*map(PerGroup, (8, 16, 32, 64, 128)), PerChannel(), PerTensor()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layers(
    count: int, formats: Sequence[Format] = SIGNED + UNSIGNED
) -> Iterator[tuple[PackedLinear, tuple[int, ...]]]:
    """Yield random packed layers, with the shapes of their plain weights."""
    for seed in range(count):
        choose = Random(seed).choice
        torch.manual_seed(seed)
        fmt, granularity, dtype = choose(formats), choose(GRANULARITIES), choose(DTYPES)
        scale = choose([MinMax(fp16), MinMax()] if fmt in UNSIGNED else SCALES)
        unit = granularity.size if isinstance(granularity, PerGroup) else 2
        o, k = choose(range(4, 10)), unit * choose(range(1, 5))
        source = choose([nn.Linear(k, o), nn.Linear(k, o), nn.Conv2d(k, o, 2)])
        shape, quantizer = tuple(source.weight.shape), Quantizer(fmt, granularity, scale)
        yield make_packed_layer(quantizer, dtype, source=source, seed=seed), shape


def make_layer_of_tiles(
    quantizer: Quantizer,
    transforms: Sequence[TransformSpec] = (),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PackedLinear:
    """Return a layer of 128 inputs and 256 outputs, whole tiles of Nunchaku's kernels."""
    source = nn.Linear(128, 256)
    return make_packed_layer(quantizer, dtype, transforms, source=source, seed=seed)


def store(target: Target, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer | None:
    """Store a layer, or return None if it is refused."""
    with suppress(UserError):
        return target.store(layer, shape, layer.dtype)
