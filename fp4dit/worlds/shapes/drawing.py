"""The shapes, colours and sizes of the shapes world, and how they are painted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.worlds.base import Thing

SIZE = 64  # pixels, both ways

COLOURS = {
    "red": (222, 45, 38),
    "orange": (245, 140, 25),
    "yellow": (250, 222, 60),
    "green": (44, 162, 70),
    "cyan": (70, 205, 225),
    "blue": (45, 80, 210),
    "purple": (125, 50, 165),
    "pink": (245, 135, 190),
}
BACKGROUNDS = {
    "white": (242, 242, 242),
    "gray": (135, 135, 135),
    "black": (22, 22, 22),
    "brown": (120, 82, 50),
}
RADII = {"small": 6.5, "large": 11.0}  # pixels

# Signed distance to each shape of radius 1, from (x, y): negative inside. Areas are alike.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.88,
    "triangle": lambda x, y: torch.maximum(y + 0.12, 0.866 * x.abs() - 0.5 * (y + 0.12)) - 0.62,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1.2) / 2**0.5,
    "cross": lambda x, y: torch.minimum(
        torch.maximum(x.abs() - 1.05, y.abs() - 0.38), torch.maximum(x.abs() - 0.38, y.abs() - 1.05)
    ),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.76).abs() - 0.30,
}


@dataclass(frozen=True)
class ShapeThing(Thing):
    """A coloured shape in a scene.

    Args:
        shape: Word for the shape, a key of `SHAPES`.
        colour: Word for the colour, a key of `COLOURS`.
        size: Word for the size, a key of `RADII`.
        x: Centre in pixels, from the left.
        y: Centre in pixels, from the top.

    Example:
        >>> ShapeThing("circle", "red", "small", x=32.0, y=32.0).kind
        'red circle'
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def kind(self) -> str:
        return f"{self.colour} {self.shape}"


def paint_shape(
    image: Float[Tensor, "n 3 h w"], shape: str, objects: Sequence[tuple[int, ShapeThing]]
) -> None:
    """Paint objects of one shape in place, each into the picture with its index.

    An index may not occur twice.
    """
    index = torch.tensor([i for i, _ in objects])
    circles = [(thing.x, thing.y, RADII[thing.size]) for _, thing in objects]
    x, y, radius = torch.tensor(circles).unbind(1)
    alpha = compute_coverage(shape, x, y, radius).unsqueeze(1)
    colour = stack_colours([COLOURS[thing.colour] for _, thing in objects])
    image[index] = torch.lerp(image[index], colour, alpha)


def stack_colours(colours: Sequence[tuple[int, int, int]]) -> Float[Tensor, "n 3 1 1"]:
    """Return 8-bit colours in [-1, 1]."""
    return torch.tensor(colours).view(-1, 3, 1, 1) / 127.5 - 1


def compute_coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Float[Tensor, "n h w"]:
    """Return the share of each pixel that a shape covers.

    Args:
        shape: Name of the shape.
        x: Centres in pixels, (n,).
        y: Centres in pixels, (n,).
        radius: Radii in pixels, (n,).
    """
    axis = torch.arange(SIZE) + 0.5
    x, y, radius = (value.view(-1, 1, 1) for value in (x, y, radius))
    distance = SHAPES[shape]((axis.view(1, 1, -1) - x) / radius, (axis.view(1, -1, 1) - y) / radius)
    return (0.5 - distance * radius).clamp(0, 1)  # one pixel of antialiasing
