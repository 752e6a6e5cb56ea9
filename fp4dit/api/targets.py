"""Tell which methods the formats of other libraries hold exactly, without a calibration."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape

import torch
from torch import nn

from fp4dit.api.presets import compose_preset, explain_config_errors
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.packed.targets.base import Target
from fp4dit.packed.targets.conversion import COMPUTE_DTYPES
from fp4dit.packed.targets.grid import PLAIN
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, make_quant_layer
from fp4dit.utils.errors import UserError
from fp4dit.utils.formatting import align_columns
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options, register_resolvers
from pipelines.planning.instantiate import instantiate_node

MODEL = "shapes"  # the model whose layers are tried, because it comes with fp4dit

PREFERRED_DTYPES = ("float32", "float16", "bfloat16")

MOST_DENSE = 0.5  # the part of the layers that a target may leave as plain weights


@dataclass(frozen=True)
class TargetFit:
    """Whether a target holds a method.

    Attributes:
        method: Name of the method.
        target: Name of the target, a file of `conf/export_format`.
        dtype: The first dtype in which it is exact; None if it is in none.
        dense: The layers that have to be plain weights.
        reason: Why it is not exact, or why those layers are not.

    Example:
        >>> fp4dit.targets(["rtn_fp4"])[0].dtype
        'float32'
    """

    method: str
    target: str
    dtype: str | None
    dense: Sequence[str]
    reason: str

    def __str__(self) -> str:
        if self.dtype is None:
            return self.reason
        dense = f" with export_format.dense=[{','.join(self.dense)}]" if self.dense else ""
        return f"exact in {self.dtype}{dense}"


class TargetTable(list[TargetFit]):
    """Fits of methods and targets. It prints as a table, and a notebook shows it as one."""

    def __str__(self) -> str:
        rows = [("method", "target", "")]
        rows += [(fit.method, fit.target, str(fit)) for fit in self]
        return "\n".join(align_columns(rows))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = ""
        for fit in self:
            cells = (f"<td>{escape(text)}</td>" for text in (fit.method, fit.target, str(fit)))
            rows += f"<tr>{''.join(cells)}</tr>"
        return f"<table>{rows}</table>"


def targets(methods: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> TargetTable:
    """Return which targets hold which methods exactly, or why they do not.

    Random weights of the shapes of the shipped model are rounded to nearest and stored. The weights
    of other models may differ in what happens to be exact; an export checks every layer.

    Args:
        methods: Names or files of presets; None for all that come with fp4dit.
        overrides: Overrides of the presets, as on the command line: `["weight.scale.dtype=bf16"]`.

    Raises:
        UserError: if there is no such preset, or an override is not valid.

    Example:
        >>> print(fp4dit.targets(["rtn_fp4", "gptq"]))
    """
    table, formats = TargetTable(), list_targets()
    for method in list_options("method") if methods is None else methods:
        preset = compose_preset(method, overrides, model=MODEL)
        if methods is None and preset.config.stages.get("reconstruct") is None:
            continue  # it quantizes no trained model
        samples = make_samples(preset.source.build_on_meta().transformer, preset.weight)
        table += [explain_fit(method, target, samples) for target in formats if samples]
    return table


def load_export_format(name: str) -> partial:
    """Return the function that a file of `conf/export_format` describes.

    Raises:
        UserError: if there is no such file.
    """
    register_resolvers()
    with explain_config_errors():
        node = compose_config("convert", [f"export_format={name}"]).export_format
        return instantiate_node("export_format", node)


def list_targets() -> list[Target]:
    """Return the targets of `conf/export_format`."""
    formats = [load_export_format(name) for name in list_options("export_format")]
    return [convert.keywords["target"] for convert in formats if "target" in convert.keywords]


def list_readers() -> list[Target]:
    """Return the targets that are read back, in the order in which they are tried."""
    return load_export_format("fp4dit").keywords["readers"]


@dataclass
class Sample:
    """A layer with random weights, in place of all layers of its shape and rule.

    Attributes:
        names: The names of these layers.
        layer: The layer.
        rule: The rule.
    """

    names: list[str]
    layer: nn.Linear | nn.Conv2d
    rule: Rule

    @cached_property
    def packed(self) -> Mapping[str, PackedLinear | str]:
        """The packed layer in each dtype, or why it is not packed."""
        return {dtype: self.pack(dtype) for dtype in PREFERRED_DTYPES}

    def pack(self, dtype: str) -> PackedLinear | str:
        """Return the packed layer in a dtype, or why no format holds it."""
        if self.rule.transforms:
            names = ", ".join(type(spec).__name__ for spec in self.rule.transforms)
            return f"it transforms its input ({names}): use transform=none"
        if self.rule.timestep_boundaries:
            return "it has a layer for each range of timesteps"
        assert self.rule.quantizer is not None
        layer = copy.deepcopy(self.layer).to(COMPUTE_DTYPES[dtype])
        try:
            quantized = make_quant_layer(layer, self.rule.quantizer, ()).prepare()
            quantized.commit_weight()
            return pack_layer(quantized)
        except UserError as error:
            return str(error)


def make_samples(model: nn.Module, rules: Sequence[Rule]) -> list[Sample]:
    """Return samples of the layers of a model that the rules quantize."""
    samples: dict[tuple[str, str], Sample] = {}
    plain = find_layers(model)
    for name, rule in assign_rules(plain, rules).items():
        if rule.quantizer is not None:
            key = (repr(rule), repr(plain[name]))
            sample = samples.setdefault(key, Sample([], make_random(plain[name]), rule))
            sample.names.append(name)
    return list(samples.values())


def make_random(layer: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return a layer with random weights and the shape of `layer`."""
    torch.manual_seed(0)
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        return nn.Conv2d(layer.in_channels, layer.out_channels, (height, width))
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features)


def explain_fit(method: str, target: Target, samples: Sequence[Sample]) -> TargetFit:
    """Return whether a target holds layers, in the dtype in which it holds most."""
    fits = {}
    for dtype in PREFERRED_DTYPES:
        reasons: dict[str, str] = {}
        for sample in samples:
            if reason := explain_layer(target, sample, dtype):
                reasons |= dict.fromkeys(sample.names, reason)
        fits[dtype] = reasons
    dtype = min(fits, key=lambda dtype: len(fits[dtype]))
    count = sum(len(sample.names) for sample in samples)
    if any(sample.rule.transforms for sample in samples) or len(fits[dtype]) > MOST_DENSE * count:
        return TargetFit(method, target.name, None, (), find_common_reason(fits["float16"]))
    return TargetFit(
        method, target.name, dtype, tuple(fits[dtype]), find_common_reason(fits[dtype])
    )


def find_common_reason(reasons: Mapping[str, str]) -> str:
    """Return the reason of most layers, without the advice to write them as plain weights."""
    texts = [text.replace(f", or {PLAIN}", "") for text in reasons.values()]
    return max(texts, key=texts.count) if texts else ""


def explain_layer(target: Target, sample: Sample, dtype: str) -> str:
    """Return why a target cannot hold a layer; an empty text if it can."""
    packed = sample.packed[dtype]
    if isinstance(packed, str):
        return packed
    try:
        target.store(packed, tuple(sample.layer.weight.shape), packed.dtype)
    except UserError as error:
        return str(error)
    return ""
