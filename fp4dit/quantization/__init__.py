"""Quantized modules, and the rules that say which layer gets which quantizer.

`FakeQuantize` simulates quantization of an activation, `QuantLayer` that of a layer. `rules`
matches names to quantizers, `apply` changes a model in place, and `audit` reports what was done.
`rule_specs` makes the rules from the options of `conf/weight` and `conf/activation`.

To add an observer: write a dataclass with the members of `Observer`; give it a tag in
`fp4dit/registry.py`; and list the tag in `OBSERVERS` of `rule_specs.py`.
"""

from fp4dit.quantization.apply import ActivationSlot
from fp4dit.quantization.attention import QuantProcessor
from fp4dit.quantization.attention_products import SageAttention
from fp4dit.quantization.audit import LayerAudit
from fp4dit.quantization.convolution import ConvGeometry, ConvolutionMixin
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.layers import QuantLayer, QuantLinearBase
from fp4dit.quantization.learnable_rounding import LearnableRounding
from fp4dit.quantization.observers import (
    MovingAverageMinMaxObserver,
    MovingAveragePartsObserver,
    PerChannelMinMaxObserver,
    SampleObserver,
)
from fp4dit.quantization.rule_specs import activation_rules, weight_rules
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import TimestepRangeLinear

__all__ = [
    "ActivationSlot",
    "ConvGeometry",
    "ConvolutionMixin",
    "FakeQuantize",
    "LayerAudit",
    "LearnableRounding",
    "MovingAverageMinMaxObserver",
    "MovingAveragePartsObserver",
    "PerChannelMinMaxObserver",
    "QuantLayer",
    "QuantLinearBase",
    "QuantProcessor",
    "Rule",
    "SageAttention",
    "SampleObserver",
    "TimestepContext",
    "TimestepFakeQuantize",
    "TimestepRangeLinear",
    "activation_rules",
    "weight_rules",
]
