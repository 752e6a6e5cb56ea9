"""Number formats and how values are mapped onto them.

`formats` defines what a code can represent; `scale_rules`, `scale_search` and `block_scales` how
the scale of a block is chosen; `quantizer` which values share a scale, and `Quantizer` puts them
together. `specs` reads all of them from the plain words of a config, such as `format: e2m1`.

To add a number format: see the head of `formats.py`. To add a scale rule: write a dataclass with
the members of `ScaleRule`, such as `AbsMax`; give it a tag in `fp4dit/registry.py`; and list the
tag in `SCALE_RULES` of `specs.py`.
"""

from fp4dit.numerics.block_scales import (
    CeilRatioExponent,
    E8M0Scale,
    NVFP4Scale,
    PowerOfTwoNVFP4Scale,
    ceil_exponent,
    even_exponent,
    floor_exponent,
    floor_ratio_exponent,
    max_magnitude,
    nearest_ratio_exponent,
)
from fp4dit.numerics.codebook import Codebook
from fp4dit.numerics.format_selection import FormatSelection, LeastError, PerBlockFormat, RangeRatio
from fp4dit.numerics.formats import Format, NumberFormat
from fp4dit.numerics.qparams import Affine, QParams, Scale, TwoSided
from fp4dit.numerics.quantizer import (
    Granularity,
    PerChannel,
    PerGroup,
    PerHead,
    PerInputChannel,
    PerRow,
    PerSplit,
    PerTensor,
    PerToken,
    Quantizer,
)
from fp4dit.numerics.rounding import StochasticRounding
from fp4dit.numerics.scale_rules import (
    AbsMax,
    MinMax,
    OffsetRange,
    RootMeanSquares,
    ScaleRule,
    StandardDeviations,
    TwoSidedAbsMax,
)
from fp4dit.numerics.scale_search import (
    BestOf,
    LeastErrorClip,
    MinError,
    PartScales,
    Percentile,
    PreShift,
    Quantile,
)
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.numerics.specs import parse_format

__all__ = [
    "AbsMax",
    "Affine",
    "BestOf",
    "CeilRatioExponent",
    "Codebook",
    "E8M0Scale",
    "Format",
    "FormatSelection",
    "Granularity",
    "LeastError",
    "LeastErrorClip",
    "MinError",
    "MinMax",
    "NVFP4Scale",
    "NumberFormat",
    "OffsetRange",
    "PartScales",
    "PerBlockFormat",
    "PerChannel",
    "PerGroup",
    "PerHead",
    "PerInputChannel",
    "PerRow",
    "PerSplit",
    "PerTensor",
    "PerToken",
    "Percentile",
    "PowerOfTwoNVFP4Scale",
    "PreShift",
    "QParams",
    "Quantile",
    "Quantizer",
    "RangeRatio",
    "RootMeanSquares",
    "Scale",
    "ScaleRule",
    "SharedMantissa",
    "StandardDeviations",
    "StochasticRounding",
    "TwoSided",
    "TwoSidedAbsMax",
    "ceil_exponent",
    "even_exponent",
    "floor_exponent",
    "floor_ratio_exponent",
    "max_magnitude",
    "nearest_ratio_exponent",
    "parse_format",
]
