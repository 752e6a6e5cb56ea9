"""Says what a picture of the shapes world shows, by analysis: no learnt weights, so nothing to overfit or attack."""

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from fp4dit.models.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    coverage,
)

UNKNOWN = "something"  # an object like none of the shapes
VISIBLE = 0.12  # distance from the background's colour, in RGB of [0, 1], at which a pixel belongs to an object
SMALLEST = 30.0  # pixels; the smallest object of the world covers 95
APART = 14.0  # pixels between the centres of two things that touch
ALIKE = 0.6  # intersection over union with the best shape, below which an object is unknown
CAPTION = re.compile(r"a (\w+) (\w+) (\w+)(?: (.+) a (\w+) (\w+) (\w+))? on a (\w+) background")


def parse(caption: str) -> Scene:
    """What a caption says; positions are NaN.

    Raises:
        ValueError: if it is not a caption of this world.
    """
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"not a caption of the shapes world: {caption!r}")
    words = match.groups()
    things = [words[:3]] if words[3] is None else [words[:3], words[4:7]]
    return Scene(
        tuple(Thing(shape, colour, size, math.nan, math.nan) for size, colour, shape in things), words[3], words[7]
    )


def judge(images: Float[Tensor, "n 3 h w"], captions: Sequence[str]) -> dict[str, list[bool]]:
    """Per image, whether the shapes, the colours, the relation, and all of these, are as the caption says.

    Shapes and colours are counted each by itself; which belongs to which decides, with the places, over the relation.
    """
    verdicts = [verdict(read(image), parse(caption)) for image, caption in zip(images, captions, strict=True)]
    return {name: [v[name] for v in verdicts] for name in ("shapes", "colours", "relation", "all")}


def verdict(seen: Scene, said: Scene) -> dict[str, bool]:
    same = lambda attribute: (
        sorted(getattr(t, attribute) for t in seen.things) == sorted(getattr(t, attribute) for t in said.things)
    )
    result = {"shapes": same("shape"), "colours": same("colour"), "relation": related(seen, said)}
    return {**result, "all": all(result.values())}


def related(seen: Scene, said: Scene) -> bool:
    """Whether the things seen, each taken for the thing said that it is most like, lie as said.

    If it cannot be told which is which, they do not.
    """
    if len(seen.things) != len(said.things):
        return False
    if said.relation is None:
        return True
    likeness = lambda order: sum(
        (a.shape == b.shape) + (a.colour == b.colour) for a, b in zip(order, said.things, strict=True)
    )
    second, first = sorted(permutations(seen.things), key=likeness)
    return likeness(first) > likeness(second) and relation(*first) == said.relation


def relation(first: Thing, second: Thing) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    return max(RELATIONS, key=lambda name: RELATIONS[name][0] * dx + RELATIONS[name][1] * dy)


def read(image: Float[Tensor, "3 h w"]) -> Scene:
    """`image` is in [0, 1]. The scene may hold any number of things; only one of two things has a relation."""
    pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = nearest(ground, BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    things = [thing for where in regions(distance > VISIBLE) for thing in inspect(pixels, ground, where)]
    return Scene(tuple(things), relation(*things) if len(things) == 2 else None, background)


def inspect(pixels: np.ndarray, ground: np.ndarray, where: np.ndarray) -> list[Thing]:
    """The things in one connected region: mostly one, two of them if they touch."""
    if where.sum() < SMALLEST:
        return []
    contrast = np.linalg.norm(pixels - ground, axis=-1) * where
    solid = where & ndimage.binary_erosion(where)
    solid = solid if solid.sum() >= SMALLEST / 3 else where
    owners = split(pixels, solid)
    things = []
    for own in owners:
        core = own & (contrast >= 0.8 * np.quantile(contrast[own], 0.9))
        colour = np.median(pixels[core], axis=0)
        # How far each pixel is on the way from the background to the colour: what the object covers of it.
        way = colour - ground
        alpha = ((pixels - ground) @ way / (way @ way)).clip(0, 1)
        alpha *= ndimage.binary_dilation(own, iterations=2) if len(owners) > 1 else ndimage.binary_dilation(where)
        for region in regions(alpha > 0.5):
            part = alpha * ndimage.binary_dilation(region)
            if part.sum() >= SMALLEST:
                things.append(recognise(part, nearest(colour, COLOURS)))
    return things


def split(pixels: np.ndarray, solid: np.ndarray) -> list[np.ndarray]:
    """The region's parts of different colours, if their centres are apart: a blurred rim surrounds its own object."""
    palette = np.array(list(COLOURS.values())) / 255
    names = np.full(solid.shape, -1)
    names[solid] = np.linalg.norm(pixels[solid][:, None] - palette, axis=-1).argmin(1)
    masks = sorted(((names == i) for i in range(len(COLOURS))), key=np.sum, reverse=True)[:2]
    if masks[1].sum() < SMALLEST / 2:
        return [solid]
    return masks if math.dist(centroid(masks[0]), centroid(masks[1])) > APART else [solid]


def recognise(alpha: np.ndarray, colour: str) -> Thing:
    """The shape whose picture of the same area and centroid overlaps most with `alpha` (h, w)."""
    x, y = centroid(alpha)
    total = float(alpha.sum())
    best, overlap = Thing(UNKNOWN, colour, size(math.sqrt(total / 3)), x, y), ALIKE
    for shape in SHAPES:
        area, cx, cy = moments(shape)
        radius = math.sqrt(total / area)
        centre = x - radius * cx, y - radius * cy
        template = coverage(shape, *(torch.tensor([v]) for v in (*centre, radius)))[0].numpy()
        ratio = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
        if ratio > overlap:
            best, overlap = Thing(shape, colour, size(radius), *centre), ratio
    return best


@cache
def moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of the shape of radius 1."""
    radius, middle = 20.0, SIZE / 2
    mask = coverage(shape, *(torch.tensor([v]) for v in (middle, middle, radius)))[0].numpy()
    x, y = centroid(mask)
    return float(mask.sum()) / radius**2, (x - middle) / radius, (y - middle) / radius


def centroid(alpha: np.ndarray) -> tuple[float, float]:
    """(x, y) in pixels, as things have it: the centre of the first pixel is at 0.5."""
    mass = alpha / alpha.sum()
    return float((np.arange(alpha.shape[1]) + 0.5) @ mass.sum(0)), float(
        (np.arange(alpha.shape[0]) + 0.5) @ mass.sum(1)
    )


def regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Connected ones, neighbours sharing an edge."""
    label, n = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues]
    return (label == i for i in range(1, n + 1))


def size(radius: float) -> str:
    return min(RADII, key=lambda name: abs(RADII[name] - radius))


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: ((rgb * 255 - palette[name]) ** 2).sum())
