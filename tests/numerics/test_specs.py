"""Words of configs, and the formats, granularities and scale rules that they stand for."""

from typing import Any

import pytest
import yaml

from fp4dit.numerics.block_scales import (
    CeilRatioExponent,
    E8M0Scale,
    NVFP4Scale,
    even_exponent,
    floor_exponent,
)
from fp4dit.numerics.format_selection import FormatSelection, LeastError, RangeRatio
from fp4dit.numerics.formats import NAMED_FORMATS, Format, floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import (
    Granularity,
    PerChannel,
    PerGroup,
    PerInputChannel,
    PerSplit,
    PerTensor,
    PerToken,
)
from fp4dit.numerics.scale_rules import (
    AbsMax,
    MinMax,
    OffsetRange,
    RootMeanSquares,
    ScaleRule,
    TwoSidedAbsMax,
)
from fp4dit.numerics.scale_search import BestOf, MinError, Percentile, PreShift
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.numerics.specs import FORMAT_EXAMPLES, parse_format, parse_granularity, parse_scale
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import CONF

FORMATS = {
    "e2m1": floating(2, 1),
    "ue3m1": floating(3, 1, signed=False),
    "e4m3": floating(4, 3),
    "e4m3fn": floating(4, 3, reserved=1),
    "e5m2ieee": floating(5, 2, reserved=4),
    "e4m3_reserved2": floating(4, 3, reserved=2),
    "fp16": floating(5, 10, reserved=2**10),
    "bf16": floating(8, 7, reserved=2**7),
    "int4": integer(4),
    "uint8": integer(8, signed=False),
    "nf4": nf4,
    "e2m2_share4": SharedMantissa(floating(2, 2), 4),
    "e2m2_share4_strict": SharedMantissa(floating(2, 2), 4, tail="error"),
}
GRANULARITIES: list[tuple[Any, Granularity]] = [
    ("tensor", PerTensor()),
    ({"per": "channel"}, PerChannel()),
    ("token", PerToken()),
    ("input_channel", PerInputChannel()),
    ({"per": "group", "size": 128}, PerGroup(128)),
    ({"per": "split", "parts": 2}, PerSplit(2)),
]
SCALES: list[tuple[Any, ScaleRule]] = [
    ("absmax", AbsMax()),
    ({"rule": "absmax", "dtype": "fp16"}, AbsMax(fp16)),
    ({"rule": "absmax", "dtype": None}, AbsMax()),
    ("absmax_two_sided", TwoSidedAbsMax()),
    ("offset_range", OffsetRange()),
    ({"rule": "percentile", "inner": "minmax", "keep": 0.9}, Percentile(MinMax(), 0.9)),
    (
        {"rule": "min_error", "inner": {"rule": "absmax", "dtype": "fp16"}, "lowest": 0.1},
        MinError(AbsMax(fp16), lowest=0.1),
    ),
    ({"rule": "best_of", "rules": ["minmax", "percentile"]}, BestOf([MinMax(), Percentile()])),
    ({"rule": "pre_shift", "span": 3}, PreShift(3)),
    ({"rule": "e8m0", "round": "even"}, E8M0Scale(even_exponent)),
    (
        {"rule": "e8m0", "round": "floor", "reach": "root_mean_squares"},
        E8M0Scale(floor_exponent, reach=RootMeanSquares()),
    ),
    (
        {"rule": "e8m0", "round": {"rule": "ceiling", "overshoot": 1.2}},
        E8M0Scale(CeilRatioExponent(1.2)),
    ),
    (
        {"rule": "nvfp4", "top": 256, "candidates": [1.0, 1.5]},
        NVFP4Scale(256.0, [1.0, 1.5]),
    ),
]


def collect_format_names(node: Any) -> set[str]:
    """Return the words that stand after `format`, `choose`, `dtype` and `spec` in a config."""
    names: set[str] = set()
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("format", "choose", "dtype", "spec"):
                values = value if isinstance(value, list) else [value]
                names |= {word for word in values if isinstance(word, str)}
            names |= collect_format_names(value)
    if isinstance(node, list):
        for value in node:
            names |= collect_format_names(value)
    return names


def formats_in_configs() -> list[str]:
    names: set[str] = set()
    for group in ("weight", "activation", "text_encoder", "rounding", "method"):
        for path in (CONF / group).glob("*.yaml"):
            names |= collect_format_names(yaml.safe_load(path.read_text()))
    return sorted(names)


@pytest.mark.parametrize(("name", "fmt"), FORMATS.items(), ids=FORMATS.keys())
def test_a_name_stands_for_a_format(name: str, fmt: Format):
    assert parse_format(name) == fmt
    assert fmt.name == name


@pytest.mark.parametrize("name", [*formats_in_configs(), *FORMAT_EXAMPLES, *NAMED_FORMATS])
def test_parsing_is_the_inverse_of_the_name(name: str):
    assert parse_format(name).name == name


def test_configs_have_formats():
    assert {"e2m1", "e3m0", "uint4", "e4m3fn", "nf4", "fp16"} <= set(formats_in_configs())


def test_a_format_selection():
    spec = {"choose": ["e3m0", "e2m1", "e1m2"], "by": "least_error", "per": "block"}
    formats = [floating(3, 0), floating(2, 1), floating(1, 2)]
    assert parse_format(spec) == FormatSelection(formats, LeastError(), "block")
    spec = {"choose": ["e2m1", "int4"], "by": {"rule": "range_ratio", "quantile": 0.5}}
    assert parse_format(spec) == FormatSelection([floating(2, 1), integer(4)], RangeRatio(0.5))


@pytest.mark.parametrize(("spec", "granularity"), GRANULARITIES)
def test_a_granularity(spec: Any, granularity: Granularity):
    assert parse_granularity(spec) == granularity


@pytest.mark.parametrize(("spec", "rule"), SCALES)
def test_a_scale_rule(spec: Any, rule: ScaleRule):
    assert parse_scale(spec) == rule


def test_objects_are_passed_through():
    for value in (floating(2, 1), FormatSelection([floating(2, 1)], LeastError())):
        assert parse_format(value) is value
    assert parse_granularity(PerGroup(7)) == PerGroup(7)
    assert parse_scale(AbsMax()) == AbsMax()


BAD_FORMATS = [
    ("e2ml", r"format 'e2ml' is not known; did you mean e2m\d or e2m"),
    ("E2M1", r"format 'E2M1' is not known; did you mean e2m1"),
    ("whatever", r"there are int4, .*nf4"),
    ("int1", r"format 'int1': an integer format needs at least 2 bits"),
    ("e0m3", r"E0M3 is not a floating-point format"),
    ("e19m9", r"format 'e19m9': "),
    ("nf4_share2", r"nf4 has no mantissa bit to share"),
    (4, r"format 4 is not known"),
    (None, r"format None is not known"),
    ({"choose": ["e2m1"]}, r"needs the option 'by'"),
    ({"choose": "e2m1", "by": "least_error"}, r"choose: e2m1 is not a list"),
    ({"choose": ["e2m1", "int8"], "by": "least_error"}, r"same number of bits"),
    ({"choose": ["e2m1"], "by": "least_eror"}, r"'least_eror' is not known; did you mean least_e"),
    ({"choose": ["e2m1"], "by": "least_error", "per": "blok"}, r"did you mean block"),
    ({"chose": ["e2m1"]}, r"no option 'chose'; did you mean choose"),
]
BAD_GRANULARITIES = [
    ("chanel", r"granularity 'chanel' is not known; did you mean channel"),
    ({"per": "group"}, r"granularity 'group' needs the option 'size'"),
    ({"per": "group", "sise": 4}, r"granularity 'group' has no option 'sise'; did you mean size"),
    ({"per": "group", "size": [1, 2]}, r"size=\[1, 2\] is not a whole number"),
    ({"per": "channel", "size": 4}, r"granularity 'channel' has no options"),
    ({"size": 4}, r"has no 'per'"),
    (None, r"granularity None is not known"),
]
BAD_SCALES = [
    ("absmx", r"scale rule 'absmx' is not known; did you mean absmax"),
    ({"rule": "absmax", "dtyp": "fp16"}, r"has no option 'dtyp'; did you mean dtype"),
    ({"rule": "absmax", "dtype": "fp61"}, r"format 'fp61' is not known; did you mean fp16"),
    ({"rule": "min_error", "inner": "minmx"}, r"'minmx' is not known; did you mean minmax"),
    ({"rule": "e8m0", "round": "evn"}, r"'evn' is not known; did you mean even"),
    ({"rule": "min_error"}, r"needs the option 'inner'"),
    ({"rule": "percentile", "keep": "most"}, r"keep=most is not a number"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_FORMATS)
def test_bad_formats_name_the_nearest_words(spec: Any, message: str):
    with pytest.raises(UserError, match=message):
        parse_format(spec)


@pytest.mark.parametrize(("spec", "message"), BAD_GRANULARITIES)
def test_bad_granularities_name_the_nearest_words(spec: Any, message: str):
    with pytest.raises(UserError, match=message):
        parse_granularity(spec)


@pytest.mark.parametrize(("spec", "message"), BAD_SCALES)
def test_bad_scale_rules_name_the_nearest_words(spec: Any, message: str):
    with pytest.raises(UserError, match=message):
        parse_scale(spec)
