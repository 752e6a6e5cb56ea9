"""Transforms of a layer's weight and input that leave their product unchanged.

Smoothing moves outliers from inputs to weights, Hadamard rotations spread them over all channels,
a low-rank branch keeps the largest part of the weight in 16 bits or in few, principal components
keep the largest part of the input, and a shift makes inputs positive. Only clips of tokens change
the product.

To add a transform: write a `Transform`, and a dataclass with the members of `TransformSpec` that
makes it, such as `Hadamard`; give the dataclass a tag in `fp4dit/registry.py`; and list the tag in
`TRANSFORMS` of `fp4dit/quantization/rule_specs.py`. Configs then name it, as in
`{kind: hadamard, size: 16}`.
"""

from fp4dit.transforms.base import Transform, TransformSpec
from fp4dit.transforms.hadamard import Hadamard, RegularHadamard
from fp4dit.transforms.low_rank import LowRank, LowRankBF16
from fp4dit.transforms.principal_components import PrincipalComponents
from fp4dit.transforms.refined_low_rank import QuantizedLowRank, RefinedLowRank
from fp4dit.transforms.shift import Shift
from fp4dit.transforms.smoothing import (
    ChannelMax,
    MovingAverageBatchMax,
    MovingAverageMax,
    PowerOfTwoSmoothingSearch,
    SalienceWeightedMax,
    Smoothing,
    SmoothingSearch,
)
from fp4dit.transforms.token_clip import TokenClipSearch

__all__ = [
    "ChannelMax",
    "Hadamard",
    "LowRank",
    "LowRankBF16",
    "MovingAverageBatchMax",
    "MovingAverageMax",
    "PowerOfTwoSmoothingSearch",
    "PrincipalComponents",
    "QuantizedLowRank",
    "RefinedLowRank",
    "RegularHadamard",
    "SalienceWeightedMax",
    "Shift",
    "Smoothing",
    "SmoothingSearch",
    "TokenClipSearch",
    "Transform",
    "TransformSpec",
]
