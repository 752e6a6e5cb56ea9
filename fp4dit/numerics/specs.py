"""Plain words for number formats, granularities and scale rules, as configs have them.

A spec is a word, or a mapping of a word and its options:

    format: e2m1                                     # or int4, uint4, nf4, e4m3fn, e2m2_share4
    format: {choose: [e3m0, e2m1, e1m2], by: least_error}
    granularity: {per: group, size: 128}             # or channel, token, tensor
    scale: {rule: absmax, dtype: fp16}
    scale: {rule: min_error, inner: absmax, lowest: 0.1, highest: 1.2, candidates: 111}

The options of a word are the fields of its class, which `fp4dit/registry.py` names. An object that
is no spec, such as one that a `_target_` of your own made, is passed through unchanged.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import NAMED_FORMATS, Format, NumberFormat, floating, integer
from fp4dit.numerics.quantizer import Granularity
from fp4dit.numerics.scale_rules import ScaleRule
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.numerics.spec_parser import check_options, parse_spec, suggest_words
from fp4dit.utils.errors import UserError

FLOAT = re.compile(r"(u?)e(\d{1,2})m(\d{1,2})(fn|ieee|_reserved(\d+))?")

INTEGER = re.compile(r"(u?)int(\d{1,2})")

SHARED = re.compile(r"(.+)_share(\d+)(_strict)?")

FORMAT_EXAMPLES = (
    *("int4", "int6", "int8", "uint4", "uint6", "uint8", "e2m1", "e1m2", "e3m0", "e2m2", "e2m3"),
    *("e3m2", "e3m4", "e4m3", "e4m3fn", "e5m2", "e5m2ieee", "ue3m1", "e2m2_share4"),
)

# The words of configs, and the tags of `fp4dit/registry.py` that they stand for.
GRANULARITIES = {
    "tensor": "per_tensor",
    "channel": "per_channel",
    "token": "per_token",
    "head": "per_head",
    "group": "per_group",
    "split": "per_split",
    "input_channel": "per_input_channel",
}

SCALE_RULES = {
    tag: tag
    for tag in (
        *("absmax", "absmax_two_sided", "minmax", "offset_range", "percentile", "quantile"),
        *("min_error", "least_error_clip", "part_scales", "best_of", "pre_shift"),
        *("e8m0", "nvfp4", "nvfp4_power_of_two"),
    )
}

CRITERIA = {"least_error": "least_error", "range_ratio": "range_ratio"}

EXPONENT_RULES = {
    "floor": "round_floor",
    "ceil": "round_ceil",
    "even": "round_even",
    "nearest": "round_nearest",
    "below": "round_below",
    "ceiling": "e8m0_ceiling",
}

REACHES = {
    "max": "largest_value",
    "standard_deviations": "standard_deviations",
    "root_mean_squares": "root_mean_squares",
}


def parse_format(spec: Any) -> Format | FormatSelection:
    """Return the number format, or the selection among several, that a spec stands for.

    The words are the names of the formats: e2m1, ue3m1 (unsigned), e4m3fn (one reserved code),
    e5m2ieee (reserved codes as in IEEE 754), int4, uint4, e2m2_share4 (4 values share the last
    mantissa bit) and those of `formats.NAMED_FORMATS`.

    Raises:
        UserError: if there is no such format.

    Example:
        >>> parse_format("e2m1") == floating(2, 1)
        True
        >>> parse_format({"choose": ["e2m1", "int4"], "by": "least_error", "per": "block"}).name
        'e2m1|int4'
    """
    if isinstance(spec, str):
        return parse_format_name(spec)
    if isinstance(spec, Mapping):
        return parse_format_selection(spec)
    if not isinstance(spec, Format | FormatSelection):
        raise UserError(f"format {spec} is not known; there are {', '.join(FORMAT_EXAMPLES)}")
    return spec


def parse_format_name(name: str) -> Format:
    """Return the number format of this name: the inverse of `Format.name`.

    Raises:
        UserError: if there is no such format.
    """
    if name in NAMED_FORMATS:
        return NAMED_FORMATS[name]
    try:
        if match := INTEGER.fullmatch(name):
            return integer(int(match[2]), signed=not match[1])
        if match := FLOAT.fullmatch(name):
            mantissa = int(match[3])
            reserved = {None: 0, "fn": 1, "ieee": 2**mantissa}.get(match[4])
            if reserved is None:
                reserved = int(match[5])
            return floating(int(match[2]), mantissa, reserved, signed=not match[1])
        if match := SHARED.fullmatch(name):
            base = parse_format_name(match[1])
            if not isinstance(base, NumberFormat):
                raise UserError(f"format {name!r}: {match[1]} has no mantissa bit to share")
            return SharedMantissa(base, int(match[2]), "error" if match[3] else "short")
    except (ValueError, OverflowError) as error:
        raise UserError(f"format {name!r}: {error}") from error
    known = [*FORMAT_EXAMPLES, *NAMED_FORMATS]
    raise UserError(f"format {name!r} is not known; {suggest_words(name, known)}")


def parse_format_selection(spec: Mapping[str, Any]) -> FormatSelection:
    """Return the selection that {choose: [...], by: criterion, per: tensor} stands for."""
    check_options(spec, ["choose", "by", "per"], "the format selection")
    if missing := [name for name in ("choose", "by") if name not in spec]:
        raise UserError(f"the format selection {dict(spec)} needs the option {missing[0]!r}")
    formats = spec["choose"]
    if isinstance(formats, str) or not isinstance(formats, Sequence):
        raise UserError(f"choose: {formats} is not a list of formats")
    per = spec.get("per", "tensor")
    if per not in ("tensor", "block", "majority"):
        known = ["tensor", "block", "majority"]
        raise UserError(f"a format per {per!r} is not known; {suggest_words(str(per), known)}")
    parsed = [cast(Format, parse_format(fmt)) for fmt in formats]
    try:
        return FormatSelection(parsed, parse_criterion(spec["by"]), per)
    except ValueError as error:
        raise UserError(str(error)) from error


def parse_criterion(spec: Any) -> Any:
    return parse_spec(spec, CRITERIA, "rule", "the criterion of a format selection")


def parse_granularity(spec: Any, words: Iterable[str] = tuple(GRANULARITIES)) -> Granularity:
    """Return the granularity that a spec stands for.

    Args:
        spec: Such as "channel" or {"per": "group", "size": 128}.
        words: The granularities that make sense here.

    Raises:
        UserError: if the word or an option is unknown.

    Example:
        >>> parse_granularity({"per": "group", "size": 128})
        PerGroup(size=128)
    """
    known = {word: GRANULARITIES[word] for word in words}
    return parse_spec(spec, known, "per", "granularity")


def parse_scale(spec: Any) -> ScaleRule:
    """Return the scale rule that a spec stands for.

    Raises:
        UserError: if the word or an option is unknown.

    Example:
        >>> parse_scale({"rule": "min_error", "inner": "minmax", "p": 2.4})
        MinError(inner=MinMax(dtype=None), p=2.4, lowest=0.5, candidates=50, highest=1.0)
    """
    return parse_spec(spec, SCALE_RULES, "rule", "scale rule", SCALE_OPTIONS)


def parse_dtype(spec: Any) -> Any:
    """Return the format that a scale is kept in; None is fp32."""
    return None if spec is None else parse_format(spec)


def parse_scales(specs: Any) -> Any:
    if isinstance(specs, str) or not isinstance(specs, Sequence):
        return specs
    return [parse_scale(spec) for spec in specs]


def parse_exponent_rule(spec: Any) -> Any:
    return parse_spec(spec, EXPONENT_RULES, "rule", "rounding of power-of-two scales")


def parse_reach(spec: Any) -> Any:
    return parse_spec(spec, REACHES, "rule", "reach of a block")


# Options of scale rules that are specs themselves.
SCALE_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "dtype": parse_dtype,
    "inner": parse_scale,
    "rules": parse_scales,
    "round": parse_exponent_rule,
    "reach": parse_reach,
}
