"""Make quantization rules from options, as the files of conf/weight and conf/activation do.

For example::

    _target_: fp4dit.quantization.weight_rules
    format: e2m1
    granularity: {per: group, size: 128}
    scale: {rule: absmax, dtype: fp16}
    layers:                                       # exceptions, each with any name
      pre_gelu: {match: "*.ff.net.0.proj", format: e3m0}
    ignore: [proj_out]                            # left in 16 bits

`fp4dit/numerics/specs.py` parses the options for formats, granularities and scale rules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import Format
from fp4dit.numerics.quantizer import Granularity, PerChannel, PerToken, Quantizer
from fp4dit.numerics.scale_rules import ScaleRule
from fp4dit.numerics.spec_parser import Spec, check_options, parse_spec
from fp4dit.numerics.specs import parse_format, parse_granularity, parse_scale
from fp4dit.quantization.attention_products import AttentionProducts
from fp4dit.quantization.observers import Observer
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.base import TransformSpec
from fp4dit.utils.errors import UserError

Patterns = str | Sequence[Any]  # shell wildcards; lists may be nested

# The words of configs, and the tags of `fp4dit/registry.py` that they stand for.
TRANSFORMS = {
    tag: tag
    for tag in (
        *("hadamard", "regular_hadamard", "smoothing", "smoothing_search", "low_rank"),
        *("smoothing_search_power_of_two", "low_rank_bf16", "low_rank_refined"),
        *("low_rank_quantized", "principal_components", "token_clip", "shift"),
    )
}

STATISTICS = {tag: tag for tag in ("channel_max", "moving_max", "moving_batch_max", "salience")}

OBSERVERS = {tag: tag for tag in ("sample", "moving_range", "moving_part_range", "channel_range")}

WEIGHT_GRANULARITIES = ("tensor", "channel", "group", "split")

ACTIVATION_GRANULARITIES = ("tensor", "token", "head", "group", "split", "input_channel")

WEIGHT_OPTIONS = ("format", "granularity", "scale", "transforms", "timestep_boundaries")

ATTENTIONS = {tag: tag for tag in ("sage",)}

ACTIVATION_OPTIONS = (
    *("format", "granularity", "scale", "observer", "per_timestep", "before_norm", "attention"),
)

SELECTION_OPTIONS = ("layers", "ignore", "match")


def weight_rules(
    format: Spec | Format | FormatSelection,
    granularity: Spec | Granularity,
    scale: Spec | ScaleRule = "absmax",
    per_channel_layers: Patterns = (),
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    ignore: Patterns = (),
    match: Patterns = "*",
    transforms: Sequence[Spec | TransformSpec] = (),
    timestep_boundaries: Sequence[int | float] = (),
    **unknown: Any,
) -> list[Rule]:
    """Return the rules that quantize weights: exceptions first, then the rule for all layers.

    Args:
        format: Number format, such as "e2m1".
        granularity: Which weights share a scale, such as {"per": "group", "size": 128}.
        scale: Scale rule, such as {"rule": "absmax", "dtype": "fp16"}.
        per_channel_layers: Patterns of layers with one scale per output channel instead, without
            transforms and timestep ranges. A model may lack them.
        layers: Exceptions by name. Each has `match`, one or several patterns, and what differs:
            any of `format`, `granularity`, `scale`, `transforms`, `timestep_boundaries`. With
            `optional: true`, a model may lack the layer.
        ignore: Patterns of layers that stay in 16 bits.
        match: Patterns of the layers that are quantized.
        transforms: Transforms of the weight and the input, such as [{"kind": "hadamard"}]; lists
            may be nested.
        timestep_boundaries: Timesteps that divide the sampling trajectory into ranges with
            transforms and weights of their own.

    Raises:
        UserError: if a word or an option is unknown.

    Example:
        >>> rules = weight_rules("e2m1", {"per": "group", "size": 128}, ignore=["proj_out"])
        >>> [rule.match for rule in rules]
        ['proj_out', '*']
    """
    names = (*WEIGHT_OPTIONS, "per_channel_layers", *SELECTION_OPTIONS)
    check_options(unknown, names, "the weight config")
    options = {
        "format": format,
        "granularity": granularity,
        "scale": scale,
        "transforms": transforms,
        "timestep_boundaries": timestep_boundaries,
    }
    per_channel_options = {
        **options,
        "granularity": PerChannel(),
        "transforms": (),
        "timestep_boundaries": (),
    }
    return [
        *make_ignore_rules(ignore),
        *make_rules(make_weight_rule, per_channel_options, per_channel_layers, optional=True),
        *make_named_rules(make_weight_rule, options, layers, "weight"),
        *make_rules(make_weight_rule, options, match),
    ]


def activation_rules(
    format: Spec | Format | FormatSelection,
    granularity: Spec | Granularity,
    scale: Spec | ScaleRule = "absmax",
    per_token_layers: Patterns = (),
    per_head_operands: Patterns = (),
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    ignore: Patterns = (),
    match: Patterns = "*",
    observer: Spec | Observer | None = None,
    per_timestep: bool = False,
    before_norm: bool = False,
    attention: Spec | AttentionProducts | None = None,
    **unknown: Any,
) -> list[Rule]:
    """Return the rules that quantize activations: exceptions first, then the rule for all.

    Args:
        format: Number format, such as "e3m4".
        granularity: Which values share a scale, such as "token".
        scale: Scale rule, such as "absmax".
        per_token_layers: Patterns of layers whose inputs have one scale per token instead. A model
            may lack them.
        per_head_operands: Patterns of attention's operands (q, k, v) with one scale per token and
            head instead. A model may lack them.
        layers: Exceptions by name. Each has `match`, one or several patterns, and what differs:
            any of `format`, `granularity`, `scale`, `observer`, `per_timestep`, `before_norm`,
            `attention`. With `optional: true`, a model may lack the layer.
        ignore: Patterns of activations that stay in 16 bits.
        match: Patterns of the activations that are quantized: layers, and q, k, v of attention.
        observer: What calibration records for static scales, such as
            {"kind": "sample", "count": 1024}; None for dynamic scales.
        per_timestep: Whether static scales are calibrated for each timestep.
        before_norm: Whether q and k are quantized before the model normalizes them.
        attention: How attention multiplies q, k and v, such as {"kind": "sage", "probabilities":
            {"format": "e2m1", "granularity": {"per": "group", "size": 16}, "scale": "nvfp4"}}; None
            for unquantized probabilities.

    Raises:
        UserError: if a word or an option is unknown.

    Example:
        >>> [rule.match for rule in activation_rules("int8", "token", ignore=["*.attn2.?"])]
        ['*.attn2.?', '*']
    """
    names = (*ACTIVATION_OPTIONS, "per_token_layers", "per_head_operands", *SELECTION_OPTIONS)
    check_options(unknown, names, "the activation config")
    options = {
        "format": format,
        "granularity": granularity,
        "scale": scale,
        "observer": observer,
        "per_timestep": per_timestep,
        "before_norm": before_norm,
        "attention": attention,
    }
    per_token_options = {**options, "granularity": PerToken()}
    return [
        *make_ignore_rules(ignore),
        *make_rules(make_activation_rule, per_token_options, per_token_layers, optional=True),
        *make_rules(make_activation_rule, per_token_options, per_head_operands, optional=True),
        *make_named_rules(make_activation_rule, options, layers, "activation"),
        *make_rules(make_activation_rule, options, match),
    ]


def make_weight_rule(
    match: str,
    format: Any,
    granularity: Any,
    scale: Any,
    transforms: Any,
    timestep_boundaries: Any,
    optional: bool = False,
) -> Rule:
    """Parse the options of a rule for weights."""
    quantizer = Quantizer(
        parse_format(format),
        parse_granularity(granularity, WEIGHT_GRANULARITIES),
        parse_scale(scale),
    )
    return Rule(
        match,
        quantizer,
        transforms=tuple(map(parse_transform, flatten_lists(transforms))),
        timestep_boundaries=tuple(timestep_boundaries or ()),
        optional=optional,
    )


def make_activation_rule(
    match: str,
    format: Any,
    granularity: Any,
    scale: Any,
    observer: Any,
    per_timestep: bool,
    before_norm: bool,
    attention: Any,
    optional: bool = False,
) -> Rule:
    """Parse the options of a rule for activations."""
    spec = {"format": format, "granularity": granularity, "scale": scale}
    return Rule(
        match,
        parse_quantizer(spec),
        observer=parse_observer(observer),
        per_timestep=per_timestep,
        before_norm=before_norm,
        attention=parse_attention(attention),
        optional=optional,
    )


def make_rules(
    make_rule: Callable[..., Rule],
    options: Mapping[str, Any],
    patterns: Patterns,
    optional: bool = False,
) -> list[Rule]:
    """Return a rule with the same options for each pattern."""
    return [make_rule(match, optional=optional, **options) for match in flatten_lists(patterns)]


def make_named_rules(
    make_rule: Callable[..., Rule],
    options: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any]] | None,
    group: str,
) -> list[Rule]:
    """Return the rules of the exceptions in `layers`.

    An exception uses the common `options` that it does not replace by its own.
    """
    rules = []
    for name, layer in (layers or {}).items():
        subject = f"{group}.layers.{name}"
        if not isinstance(layer, Mapping) or "match" not in layer:
            raise UserError(f"{subject} has no `match`: give it the pattern of a layer's name")
        check_options(layer, ["match", "optional", *options], subject)
        merged = {**options, **layer}
        match, optional = merged.pop("match"), merged.pop("optional", False)
        rules += make_rules(make_rule, merged, match, optional)
    return rules


def make_ignore_rules(patterns: Patterns) -> list[Rule]:
    """Return rules that leave layers in 16 bits."""
    return [Rule(match, None) for match in flatten_lists(patterns)]


def flatten_lists(items: Any) -> list[Any]:
    """Return the items of a list that may hold lists, in order; of another value itself."""
    if not items:
        return []
    if isinstance(items, str) or not isinstance(items, Sequence):
        return [items]
    flat = []
    for inner in items:
        flat += flatten_lists(inner)
    return flat


def parse_transform(spec: Any) -> TransformSpec:
    """Return the transform that a spec stands for, such as {"kind": "smoothing", "alpha": 0.5}.

    Raises:
        UserError: if the kind or an option is unknown.
    """
    parsers = {"statistic": parse_statistic, "branch": parse_branch}
    return parse_spec(spec, TRANSFORMS, "kind", "transform", parsers)


def parse_branch(spec: Any) -> Any:
    """Return the low-rank branch under which smoothing factors are searched; None for none."""
    return None if spec is None else parse_transform(spec)


def parse_statistic(spec: Any) -> Any:
    """Return the channel statistic that a spec stands for, such as "channel_max"."""
    return parse_spec(spec, STATISTICS, "kind", "statistic of a smoothing transform")


def parse_observer(spec: Any) -> Observer | None:
    """Return the observer that a spec stands for, such as {"kind": "sample", "count": 1024}.

    Raises:
        UserError: if the kind or an option is unknown.
    """
    return None if spec is None else parse_spec(spec, OBSERVERS, "kind", "observer")


def parse_attention(spec: Any) -> AttentionProducts | None:
    """Return the products of attention that a spec stands for, such as {"kind": "sage", ...}.

    Raises:
        UserError: if the kind or an option is unknown.
    """
    if spec is None:
        return None
    parsers = {"probabilities": parse_quantizer}
    return parse_spec(spec, ATTENTIONS, "kind", "attention", parsers)


def parse_quantizer(spec: Any) -> Quantizer:
    """Return the quantizer of an activation, from its format, granularity and scale.

    Raises:
        UserError: if a word or an option is unknown.
    """
    if isinstance(spec, Quantizer):
        return spec
    check_options(spec, ("format", "granularity", "scale"), "a quantizer")
    return Quantizer(
        parse_format(spec["format"]),
        parse_granularity(spec["granularity"], ACTIVATION_GRANULARITIES),
        parse_scale(spec.get("scale", "absmax")),
    )
