"""Tell which methods the formats of other libraries hold exactly, without a calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from fp4dit.api.presets import compose_preset, explain_config_errors
from fp4dit.packed.targets.base import Target
from fp4dit.packed.targets.grid import PLAIN
from fp4dit.packed.targets.samples import FEW_ROWS, Sample, explain_layer, make_samples
from fp4dit.utils.formatting import align_columns
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options, register_resolvers
from pipelines.planning.instantiate import instantiate_node

MODEL = "shapes"  # the model whose layers are tried, because it comes with fp4dit

PREFERRED_DTYPES = ("float32", "float16", "bfloat16")

REASON_DTYPES = ("float16", "bfloat16", "float32")  # no format lacks the first one

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

    def to_markdown(self) -> str:
        """Return a table of methods and targets in Markdown: the dtype in which each is exact.

        A star stands for layers that have to be plain weights, and a dash for what is refused. The
        last column has the most frequent reason, without what to do about it.
        """
        targets = list(dict.fromkeys(fit.target for fit in self))
        fits = {(fit.method, fit.target): fit for fit in self}
        lines = [["method", *targets, "refused because"], ["---"] * (len(targets) + 2)]
        for method in dict.fromkeys(fit.method for fit in self):
            cells, reasons = [], []
            for fit in (fits[method, target] for target in targets):
                if fit.dtype is None:
                    reasons.append(fit.reason.partition(": ")[0])
                cells.append(f"{fit.dtype}{'*' if fit.dense else ''}" if fit.dtype else "–")
            reason = max(reasons, key=reasons.count, default="")
            lines.append([f"`{method}`", *cells, reason])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _repr_html_(self) -> str:
        rows = ""
        for fit in self:
            cells = (f"<td>{escape(text)}</td>" for text in (fit.method, fit.target, str(fit)))
            rows += f"<tr>{''.join(cells)}</tr>"
        return f"<table>{rows}</table>"


def targets(methods: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> TargetTable:
    """Return which targets hold which methods exactly, or why they do not.

    Random weights in the shapes of the shipped model are rounded to nearest and stored; 128 rows of
    them, where they are not transformed. The weights of other models may differ in what happens to
    be exact; an export checks every layer.

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
        model = preset.source.build_on_meta().transformer
        samples = make_samples(model, preset.weight, FEW_ROWS)
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


def explain_fit(method: str, target: Target, samples: Sequence[Sample]) -> TargetFit:
    """Return whether a target holds layers, in the dtype in which it holds most."""
    fits = {}
    for dtype in PREFERRED_DTYPES:
        reasons: dict[str, str] = {}
        for sample in samples:
            if reason := explain_layer(target, sample, dtype):
                reasons |= dict.fromkeys(sample.names, reason)
        fits[dtype] = reasons
        if not reasons:
            break
    dtype = min(fits, key=lambda dtype: len(fits[dtype]))
    count = sum(len(sample.names) for sample in samples)
    names_with_transforms = {
        name for sample in samples if sample.rule.transforms for name in sample.names
    }
    if names_with_transforms & fits[dtype].keys() or len(fits[dtype]) > MOST_DENSE * count:
        nearest = min(REASON_DTYPES, key=lambda dtype: len(fits[dtype]))  # all were tried
        return TargetFit(method, target.name, None, (), find_common_reason(fits[nearest]))
    return TargetFit(
        method, target.name, dtype, tuple(fits[dtype]), find_common_reason(fits[dtype])
    )


def find_common_reason(reasons: Mapping[str, str]) -> str:
    """Return the reason of most layers, without the advice to write them as plain weights."""
    texts = [text.replace(f", or {PLAIN}", "") for text in reasons.values()]
    return max(texts, key=texts.count) if texts else ""
