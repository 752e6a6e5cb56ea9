"""The page docs/concepts/fp4-or-int4.md, written from what was computed and measured."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from textwrap import TextWrapper

import numpy as np
import torch

from benchmarks.format_curves import (
    GENERALIZED,
    ROW,
    SIZES,
    TENSOR,
    Curve,
    Ratios,
    compute_ratios,
    list_bits,
    name_size,
)
from benchmarks.format_layers import MAX_VALUES, LayerNoise, group_by_kind
from benchmarks.format_sentences import describe_rotation, write_answer, write_paper
from benchmarks.format_template import TEMPLATE
from fp4dit.analysis import Distribution, GeneralizedNormal, StudentT
from fp4dit.analysis.weight_formats import BLOCK_FORMATS, ELEMENTS, TITLES

# The distributions of the first table, by what they are called.
DISTRIBUTIONS: dict[str, Distribution] = {
    "normal": GeneralizedNormal(2.0),
    "Laplace, kurtosis 3": GeneralizedNormal(1.0),
    "Student's t, 5 degrees, kurtosis 6": StudentT(5.0),
    "Student's t, 3 degrees, kurtosis infinite": StudentT(3.0),
}

MEASURED = ("int4", "uint4", "e2m1", "e3m0", "nf4")

PREDICTED = (16, 128)  # sizes of blocks that every layer has

Models = Mapping[str, Sequence[LayerNoise]]


def write_page(curves: Mapping[str, Curve], models: Models) -> str:
    """Return the page."""
    tables = {title: compute_ratios(d) for title, d in DISTRIBUTIONS.items()}
    bits = list_bits((16, 32, 64, 128))
    kurtosis = [k for curve in curves.values() for k in curve.kurtosis]
    page = TEMPLATE.format(
        answer="\n".join(write_answer(curves, tables["normal"])),
        models=" and ".join(models),
        distributions=write_distributions(tables),
        bits=", ".join(f"{bits['int4', n]:g}" for n in (16, 32, 64, 128)),
        blocks=write_blocks(tables),
        lightest=min(kurtosis),
        heaviest=max(kurtosis),
        crossings=write_crossings(curves),
        layers="\n\n".join(write_layers(name, m, curves) for name, m in models.items()),
        rotation="\n\n".join(write_rotation(name, m) for name, m in models.items()),
        paper="\n\n".join(write_paper(curves, models)),
        limit=MAX_VALUES,
        every="\n\n".join(write_every_layer(name, m) for name, m in models.items()),
    )
    return "\n\n".join(map(wrap, page.strip().split("\n\n"))) + "\n"


def wrap(part: str) -> str:
    """Return a part of the page in lines of the width of the documentation, if it is text."""
    if part.startswith(("#", "|", "!", "<", "```")):
        return part
    items = part.split("\n") if part.startswith("- ") else [" ".join(part.split("\n"))]
    wrapper = TextWrapper(120, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = "  " if part.startswith("- ") else ""
    return "\n".join(map(wrapper.fill, items))


def write_row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def write_table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table whose columns but the first one are numbers."""
    lines = [write_row(*heading), write_row("---", *["---:"] * (len(heading) - 1))]
    return "\n".join([*lines, *(write_row(*row) for row in rows)])


def write_distributions(tables: Mapping[str, Ratios]) -> str:
    """Return the table of the formats with an fp16 scale."""
    rows = []
    for title, ratios in tables.items():
        rows.append((f"**{title}**", *[""] * len(SIZES)))
        for name in ELEMENTS:
            cells = []
            for size in SIZES:
                best = max(ratios[other, size] for other in ELEMENTS)
                text = f"{ratios[name, size]:.1f}"
                cells.append(f"**{text}**" if ratios[name, size] > best - 0.05 else text)
            rows.append((TITLES[name], *cells))
    return write_table(["values that share a scale", *map(name_titles, SIZES)], rows)


def name_titles(size: int) -> str:
    """Return the heading of a column."""
    return f"{name_size(size)}, {size:,}" if size in (ROW, TENSOR) else name_size(size)


def write_blocks(tables: Mapping[str, Ratios]) -> str:
    """Return the table of the formats with blocks of their own."""
    rows = []
    for name, quantizer in BLOCK_FORMATS.items():
        size = quantizer.granularity.width(torch.Size([1 << 16]))
        bits = 4 + 8 / size
        cells = [f"{ratios[name, size]:.1f}" for ratios in tables.values()]
        rows.append((TITLES[name], size, f"{bits:.2f}", *cells))
    return write_table(["", "block", "bits", *tables], rows)


def write_crossings(curves: Mapping[str, Curve]) -> str:
    """Return the table of the kurtosis at which formats change places."""
    pairs = [("e2m1", "int4"), ("e2m1", "uint4"), ("nf4", "uint4"), ("e3m0", "e2m1")]
    rows = []
    for name, other in pairs:
        for family, curve in curves.items():
            cells = [format_crossing(curve.find_crossing(name, other, size)) for size in SIZES]
            rows.append((f"{TITLES[name]} passes {TITLES[other]}, {family}", *cells))
    return write_table(["values that share a scale", *map(name_titles, SIZES)], rows)


def format_crossing(kurtosis: float | None) -> str:
    """Return a kurtosis as the cell of a table."""
    if kurtosis is None:
        return "never"
    return "always" if kurtosis == -np.inf else f"{kurtosis:.1f}"


def write_layers(model: str, layers: Sequence[LayerNoise], curves: Mapping[str, Curve]) -> str:
    """Return a table of the kinds of layers, and how well the kurtosis alone predicts them."""
    rows = []
    for kind, members in group_by_kind(layers):
        kurtosis = [
            format_range([m.kurtosis[n] for m in members], 2) for n in (16, 128, ROW, TENSOR)
        ]
        ratios = [f"{median(m.ratios[f, 128] for m in members):.1f}" for f in MEASURED]
        rows.append((f"`{kind}`", len(members), *kurtosis, *ratios))
    heading = ["layers", "number", *(f"kurtosis, {name_size(n)}" for n in (16, 128, ROW, TENSOR))]
    table = write_table([*heading, *(f"{TITLES[f]}, g128" for f in MEASURED)], rows)
    wins = "; ".join(write_wins(layers))
    return (
        f"**{model.capitalize()}**, {len(layers)} layers. The kurtosis of blocks of 16 and 128, of "
        "rows and of tensors is given from the least to the largest layer, and the ratio in dB of "
        f"groups of 128 for the median layer.\n\n{table}\n\nThe number of layers in which a format "
        f"has the least error: {wins}.\n\n{write_prediction(layers, curves[GENERALIZED])}"
    )


def write_wins(layers: Sequence[LayerNoise]) -> Iterator[str]:
    """Yield in how many layers each format wins, for some sizes of blocks."""
    for size in (16, 128, ROW, TENSOR):
        winners = [max(MEASURED, key=lambda f, m=m: m.ratios[f, size]) for m in layers]
        counts = {name: winners.count(name) for name in MEASURED if name in winners}
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        where = f"blocks of {size}" if size <= 128 else f"{name_size(size)}"
        yield f"{where}: " + ", ".join(f"{TITLES[name]} {count}" for name, count in ordered)


def write_prediction(layers: Sequence[LayerNoise], curve: Curve) -> str:
    """Return how far layers are from what their kurtosis alone predicts."""
    rows, gaps = [], {}
    for name in MEASURED:
        cells = []
        for size in PREDICTED:
            for m in layers:
                predicted = curve.predict(name, size, m.kurtosis[size])
                gaps[name, size, m.name] = m.ratios[name, size] - predicted
            found = np.array([gaps[name, size, m.name] for m in layers])
            cells += [f"{found.mean():+.2f}", f"{np.sqrt(np.mean(found**2)):.2f}"]
        rows.append((TITLES[name], *cells))
    _, size, worst = largest = max(gaps, key=lambda key: abs(gaps[key]))
    heading = [f"{what}, blocks of {n}" for n in PREDICTED for what in ("mean", "rms")]
    table = write_table(["measured less predicted, dB", *heading], rows)
    return (
        "The kurtosis within a block predicts the ratio of a layer. This is what was measured less "
        f"what the {GENERALIZED} distribution of the same kurtosis has; `{worst}` is furthest from "
        f"it, by {gaps[largest]:+.1f} dB in blocks of {size}.\n\n{table}"
    )


def write_rotation(model: str, layers: Sequence[LayerNoise]) -> str:
    """Return a table of the layers before and after a Hadamard rotation of whole rows."""
    turned = [(m, m.rotated) for m in layers if m.rotated]
    rows = []
    for size in (16, 128, ROW, TENSOR):
        before = [m.kurtosis[size] for m, _ in turned]
        after = [r.kurtosis[size] for _, r in turned]
        gains = []
        for name in MEASURED:
            gain = [r.ratios[name, size] - m.ratios[name, size] for m, r in turned]
            gains.append(f"{np.mean(gain):+.2f} [{min(gain):+.1f}, {max(gain):+.1f}]")
        rows.append((name_size(size), format_range(before, 2), format_range(after, 2), *gains))
    heading = ["values that share a scale", "kurtosis before", "after"]
    table = write_table([*heading, *(f"{TITLES[f]}, dB" for f in MEASURED)], rows)
    return (
        f"**{model.capitalize()}**, {len(turned)} layers: the kurtosis from the least to the "
        "largest layer, and what is gained on average, with the least and the largest gain.\n\n"
        f"{table}\n\n{describe_rotation(turned)}"
    )


def write_every_layer(model: str, layers: Sequence[LayerNoise]) -> str:
    """Return the table of all layers of a model."""
    columns = [*((f, 128) for f in MEASURED), ("uint4", ROW), ("e2m1", ROW), ("uint4", TENSOR)]
    columns += [("e2m1", TENSOR), ("nvfp4", 16), ("if4", 16), ("mxfp4", 32)]
    rows = []
    for m in layers:
        cells = [f"{m.ratios[key]:.1f}" for key in columns]
        kurtosis = [f"{m.kurtosis[n]:.2f}" for n in (128, ROW, TENSOR)]
        rows.append((f"`{m.name}`", "x".join(map(str, m.shape)), *kurtosis, *cells))
    titles = [f"{name}{describe_blocks(name, size)}" for name, size in columns]
    kurtoses = [f"kurtosis, {name}" for name in ("g128", "row", "tensor")]
    return (
        f"**{model.capitalize()}**\n\n{write_table(['layer', 'shape', *kurtoses, *titles], rows)}"
    )


def describe_blocks(name: str, size: int) -> str:
    """Return what the heading of a column says about blocks."""
    if name in BLOCK_FORMATS:
        return ""
    return {ROW: ", row", TENSOR: ", tensor"}.get(size, f", g{size}")


def format_range(values: Sequence[float], digits: int) -> str:
    """Return the least and the largest of some values, if they differ."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
