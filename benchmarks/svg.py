"""Draw line plots as SVG text, without a plotting library."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]

# Okabe and Ito's colors, which also readers with impaired color vision tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")

MARGIN = {"left": 46, "right": 12, "top": 26, "bottom": 40}


@dataclass
class Panel:
    """A plot with its own axes.

    Attributes:
        title: The title.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        x_ticks: The values with a tick on the x axis.
        y_ticks: The values with a tick on the y axis.
        x_range: The least and the largest x.
        y_range: The least and the largest y.
        x_map: A function that stretches the x axis.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_range: Point
    y_range: Point
    x_map: Callable[[float], float]
    lines: list[tuple[Sequence[Point], str, bool]] = field(default_factory=list)
    dots: list[tuple[Point, str, str]] = field(default_factory=list)

    def add_line(self, points: Sequence[Point], color: str, dashed: bool = False) -> None:
        """Add a line through points."""
        self.lines.append((points, color, dashed))

    def add_dot(self, point: Point, color: str, label: str) -> None:
        """Add a dot, whose label is shown under the pointer."""
        self.dots.append((point, color, label))

    def draw(self, x0: float, y0: float, width: float, height: float) -> Iterator[str]:
        """Yield the elements of the panel, in a rectangle."""
        left, right = x0 + MARGIN["left"], x0 + width - MARGIN["right"]
        top, bottom = y0 + MARGIN["top"], y0 + height - MARGIN["bottom"]
        low, high = (self.x_map(x) for x in self.x_range)

        def place(point: Point) -> tuple[float, float]:
            x = left + (self.x_map(point[0]) - low) / (high - low) * (right - left)
            y_share = (point[1] - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
            return round(x, 1), round(bottom - y_share * (bottom - top), 1)

        name = f"clip{x0:.0f}-{y0:.0f}"
        size = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
        yield f'<clipPath id="{name}"><rect {size}/></clipPath>'
        yield from self.draw_axes(place, (left, right, top, bottom))
        yield f'<g clip-path="url(#{name})">'
        for points, color, dashed in self.lines:
            path = " ".join(f"{x},{y}" for x, y in map(place, points))
            dash = ' stroke-dasharray="5 3"' if dashed else ""
            yield (
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"{dash}/>'
            )
        for point, color, label in self.dots:
            x, y = place(point)
            yield (
                f'<circle cx="{x}" cy="{y}" r="2.6" fill="{color}" fill-opacity="0.45">'
                f"<title>{escape(label)}</title></circle>"
            )
        yield "</g>"
        yield f'<rect {size} fill="none" stroke="#555"/>'

    def draw_axes(
        self,
        place: Callable[[Point], tuple[float, float]],
        edges: tuple[float, float, float, float],
    ) -> Iterator[str]:
        """Yield the grid, the ticks and the labels."""
        left, right, top, bottom = edges
        for value in self.x_ticks:
            x, _ = place((value, self.y_range[0]))
            yield f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" stroke="#e4e4e4"/>'
            yield write_text(x, bottom + 14, f"{value:g}", "middle")
        for value in self.y_ticks:
            _, y = place((self.x_range[0], value))
            color = "#999" if value == 0 else "#e4e4e4"
            yield f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="{color}"/>'
            yield write_text(left - 5, y + 4, f"{value:g}", "end")
        yield write_text((left + right) / 2, bottom + 30, self.x_label, "middle")
        yield write_text((left + right) / 2, top - 9, self.title, "middle", bold=True)
        x, y = left - 32, (top + bottom) / 2
        yield f'<g transform="rotate(-90 {x} {y})">{write_text(x, y, self.y_label, "middle")}</g>'


def write_text(x: float, y: float, text: str, anchor: str = "start", bold: bool = False) -> str:
    """Return a text element."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def draw_figure(
    panels: Sequence[Panel],
    columns: int,
    legend: Mapping[str, tuple[str, bool]],
    size: tuple[int, int] = (400, 330),
) -> str:
    """Return the SVG of panels in a grid, with a legend below.

    Args:
        panels: The panels, row by row.
        columns: The number of panels in a row.
        legend: The color of each line, and whether it is dashed, by its label.
        size: The width and height of a panel in pixels.
    """
    width, rows = columns * size[0], -(-len(panels) // columns)
    per_line = max(1, width // 170)
    height = rows * size[1] + 20 * -(-len(legend) // per_line) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        parts += panel.draw(i % columns * size[0], i // columns * size[1], *size)
    for i, (label, (color, dashed)) in enumerate(legend.items()):
        x, y = 20 + i % per_line * 170, rows * size[1] + 12 + 20 * (i // per_line)
        dash = ' stroke-dasharray="5 3"' if dashed else ""
        line = f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" stroke="{color}"'
        parts.append(f'{line} stroke-width="2.2"{dash}/>{write_text(x + 30, y + 4, label)}')
    return "\n".join([*parts, "</svg>", ""])
