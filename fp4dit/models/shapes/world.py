"""A procedural world: one or two objects on a coloured background, its caption and its picture.

Small enough for a model of a few million parameters to learn on a laptop, and yet compositional: which
shape has which colour and size, and how two objects lie to one another, is said only by the caption.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

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
BACKGROUNDS = {"white": (242, 242, 242), "gray": (135, 135, 135), "black": (22, 22, 22), "brown": (120, 82, 50)}
RADII = {"small": 6.5, "large": 11.0}  # pixels
# Unit vector from the second object to the first; y points down, as in the picture.
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PLACES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # where an object can be, the middle last

# Signed distance to each shape of radius 1, from (x, y): negative inside. Areas are alike, so that none looks larger.
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
class Thing:
    """One object; `x` and `y` are its centre in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says and a picture shows. `relation` places the first of two things; one thing has none."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        return f" {self.relation} ".join(map(str, self.things)) + f" on a {self.background} background"

    @property
    def places(self) -> tuple[int, ...]:
        """For each thing, the index of its place in PLACES."""
        if self.relation is None:
            return (PLACES.index((0, 0)),)
        dx, dy = RELATIONS[self.relation]
        return PLACES.index((dx, dy)), PLACES.index((-dx, -dy))

    @property
    def held_out(self) -> bool:
        """Whether this combination of objects is kept for evaluation.

        A tenth of all combinations of two (colour, shape) pairs, whatever their sizes, order, relation
        and background; a lone object is combined with its size and background instead.
        """
        kinds = sorted(f"{t.colour} {t.shape}" for t in self.things)
        if len(kinds) == 1:
            kinds += [self.things[0].size, self.background]
        return hashlib.sha256(" ".join(kinds).encode()).digest()[0] < 26


def place(rng: Random, relation: str | None) -> list[tuple[float, float]]:
    """Centres of the objects in pixels: opposite each other, never overlapping."""
    if relation is None:
        return [(SIZE / 2 + rng.uniform(-7, 7), SIZE / 2 + rng.uniform(-7, 7))]
    dx, dy = RELATIONS[relation]
    centres = []
    for side in (1, -1):
        along, across = side * rng.uniform(14, 18), rng.uniform(-6, 6)
        centres.append((SIZE / 2 + dx * along + dy * across, SIZE / 2 + dy * along + dx * across))
    return centres


def draw(rng: Random) -> Scene:
    """Any scene, held out or not."""
    relation = rng.choice([None, *RELATIONS])
    kinds = rng.sample([(s, c) for s in SHAPES for c in COLOURS], 1 if relation is None else 2)
    things = tuple(
        Thing(shape, colour, rng.choice(list(RADII)), x, y)
        for (shape, colour), (x, y) in zip(kinds, place(rng, relation), strict=True)
    )
    return Scene(things, relation, rng.choice(list(BACKGROUNDS)))


def scenes(seed: int, held_out: bool) -> Iterator[Scene]:
    """An endless, reproducible stream from one side of the split."""
    rng = Random(seed)
    while True:
        scene = draw(rng)
        if scene.held_out == held_out:
            yield scene


def variant(scene: Scene, rng: Random) -> Scene:
    """The scene with one word changed: what a caption must be told apart from."""
    things = list(scene.things)
    i = rng.randrange(len(things))
    match rng.choice(["colour", "shape", "size", "background", "relation", "swap"]):
        case "colour":
            things[i] = replace(things[i], colour=rng.choice(list(COLOURS)))
        case "shape":
            things[i] = replace(things[i], shape=rng.choice(list(SHAPES)))
        case "size":
            things[i] = replace(things[i], size=rng.choice(list(RADII)))
        case "background":
            return replace(scene, background=rng.choice(list(BACKGROUNDS)))
        case "relation" if scene.relation:
            relation = rng.choice(list(RELATIONS))
            things = [replace(t, x=x, y=y) for t, (x, y) in zip(things, place(rng, relation), strict=True)]
            return replace(scene, things=tuple(things), relation=relation)
        case "swap" if scene.relation:
            first, second = things
            things = [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)][::-1]
    return replace(scene, things=tuple(things))


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Float[Tensor, "n h w"]:
    """How much of each pixel the shape covers, in [0, 1]; `x`, `y` and `radius` are (n,) and in pixels."""
    axis = torch.arange(SIZE) + 0.5
    x, y, radius = (v.view(-1, 1, 1) for v in (x, y, radius))
    distance = SHAPES[shape]((axis.view(1, 1, -1) - x) / radius, (axis.view(1, -1, 1) - y) / radius)
    return (0.5 - distance * radius).clamp(0, 1)  # one pixel of antialiasing


def render(batch: Sequence[Scene]) -> Float[Tensor, "n 3 h w"]:
    """Pictures in [-1, 1], as diffusion models take them."""
    colour = lambda rgb: torch.tensor(rgb).view(-1, 3, 1, 1) / 127.5 - 1
    image = colour([BACKGROUNDS[s.background] for s in batch]).expand(-1, -1, SIZE, SIZE).clone()
    for shape in SHAPES:
        found = [(i, t) for i, s in enumerate(batch) for t in s.things if t.shape == shape]
        for turn in (found[::2], found[1::2]):  # a scene may hold a shape twice; its two are neighbours in `found`
            if not turn:
                continue
            index = torch.tensor([i for i, _ in turn])
            x, y, r = torch.tensor([(t.x, t.y, RADII[t.size]) for _, t in turn]).unbind(1)
            alpha = coverage(shape, x, y, r).unsqueeze(1)
            image[index] = torch.lerp(image[index], colour([COLOURS[t.colour] for _, t in turn]), alpha)
    return image
