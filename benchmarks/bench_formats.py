"""Compare 4-bit formats of weights, and write the page and the figures about FP4 and INT4.

    python -m benchmarks.bench_formats
    python -m benchmarks.bench_formats --model /my/pixart --model /my/hunyuan

writes docs/concepts/fp4-or-int4.md and two figures in docs/assets. It takes two minutes on one
core. With `--out FOLDER` it writes to a copy of these folders elsewhere.
"""

import math
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.format_curves import (
    GENERALIZED,
    ROW,
    SIZES,
    STUDENT,
    TENSOR,
    Curve,
    compute_curves,
    name_size,
)
from benchmarks.format_layers import LayerNoise, measure_model
from benchmarks.format_page import write_page
from benchmarks.svg import COLORS, Panel, draw_figure
from fp4dit.analysis.weight_formats import TITLES
from fp4dit.utils.files import atomic_write

DOCS = Path(__file__).parents[1] / "docs"

SHIPPED = {"the shipped model": "pkg://fp4dit/worlds/shapes/weights"}

DASHED = {GENERALIZED: False, STUDENT: True}

PLACED = (16, 128)  # sizes of blocks whose layers are drawn

ELEMENT_COLORS = dict(zip(("int4", "uint4", "e2m1", "e3m0", "nf4"), COLORS, strict=False))
BLOCK_COLORS = dict(zip(("nvfp4", "nvint4", "if4"), COLORS[5:], strict=True))

KURTOSIS_TICKS = (-1.2, 0, 1, 2, 3, 5, 10, 20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, measure, and write the page and the figures."""
    parser = ArgumentParser("python -m benchmarks.bench_formats", description=__doc__)
    parser.add_argument(
        "--model",
        metavar="PATH",
        action="append",
        default=[],
        help="folder or hub id of a diffusers pipeline whose layers are placed on the page too",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=DOCS, help="default: docs")
    options = parser.parse_args(arguments)
    paths = SHIPPED | {Path(path).name: path for path in options.model}
    models = {name: measure_model(path) for name, path in paths.items()}
    write_all(options.out, compute_curves(), models)


def write_all(
    out: Path, curves: Mapping[str, Curve], models: Mapping[str, Sequence[LayerNoise]]
) -> None:
    """Write the page and the figures.

    Args:
        out: The folder of the documentation.
        curves: The curve of each family.
        models: The layers of each model.
    """
    texts = {
        "assets/fp4-or-int4.svg": draw_differences(curves, models),
        "assets/4-bit-formats.svg": draw_ratios(curves),
        "concepts/fp4-or-int4.md": write_page(curves, models),
    }
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / name) as part:
            part.write_text(text)
        print(out / name)


def stretch(kurtosis: float) -> float:
    """Return the place of an excess kurtosis on an axis: the logarithm of the kurtosis."""
    return math.log(kurtosis + 3)


def draw_differences(
    curves: Mapping[str, Curve], models: Mapping[str, Sequence[LayerNoise]]
) -> str:
    """Draw by how many dB E2M1 exceeds INT4, without and with a zero point."""
    colors = dict(zip(SIZES, COLORS, strict=False))
    panels = []
    for other in ("int4", "uint4"):
        panel = Panel(
            f"E2M1 less {TITLES[other]}",
            "excess kurtosis within a block",
            "dB",
            KURTOSIS_TICKS,
            range(-4, 7, 2),
            (-1.3, 22.5),
            (-5.0, 6.5),
            stretch,
        )
        for size, color in colors.items():
            for family, curve in curves.items():
                panel.add_line(curve.differences("e2m1", other, size), color, DASHED[family])
        for model, layers in models.items():
            for layer in layers:
                for size in PLACED:
                    difference = layer.ratios["e2m1", size] - layer.ratios[other, size]
                    label = f"{model}: {layer.name}, {name_size(size)}"
                    panel.add_dot((layer.kurtosis[size], difference), colors[size], label)
        panels.append(panel)
    legend = {describe_size(size): (color, False) for size, color in colors.items()}
    return draw_figure(panels, 2, legend | describe_families(), (430, 380))


def draw_ratios(curves: Mapping[str, Curve]) -> str:
    """Draw the ratios of all formats for some sizes of blocks."""
    panels = []
    for size, least in ((16, 12), (128, 12), (ROW, 0), (TENSOR, 0)):
        panel = Panel(
            describe_size(size),
            "excess kurtosis within a block",
            "signal to noise, dB",
            KURTOSIS_TICKS,
            range(least, 26, 2 if least else 5),
            (-1.3, 22.5),
            (least, 25.0),
            stretch,
        )
        colors = ELEMENT_COLORS | (BLOCK_COLORS if size == 16 else {})
        for name, color in colors.items():
            for family, curve in curves.items():
                panel.add_line(curve.points(name, size), color, DASHED[family])
        panels.append(panel)
    legend = {
        TITLES[name]: (color, False) for name, color in (ELEMENT_COLORS | BLOCK_COLORS).items()
    }
    return draw_figure(panels, 2, legend | describe_families(), (430, 330))


def describe_size(size: int) -> str:
    """Return a size of blocks as a title."""
    return {ROW: f"a row ({ROW})", TENSOR: "a tensor (a million)"}.get(size, f"groups of {size}")


def describe_families() -> dict[str, tuple[str, bool]]:
    """Return the entries of a legend for the kinds of lines."""
    return {family: ("#555", dashed) for family, dashed in DASHED.items()}


if __name__ == "__main__":
    main()
