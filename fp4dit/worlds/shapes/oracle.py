"""Read the scene of a picture of the shapes world, by image analysis without learned weights."""

import math
from collections.abc import Sequence
from functools import cache, partial
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.worlds.base import RELATIONS, Scene
from fp4dit.worlds.shapes.drawing import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SIZE,
    ShapeThing,
    compute_coverage,
)

UNKNOWN = "something"  # an object like none of the shapes
# Distance from the background's colour, in RGB of [0, 1], at which a pixel belongs to an object.
VISIBLE = 0.12
SMALLEST = 30.0  # pixels; the smallest object of the world covers 95
APART = 14.0  # pixels between the centres of two objects that touch
ALIKE = 0.6  # intersection over union with the best shape, below which an object is unknown


def compare_scenes(seen: Scene, said: Scene) -> dict[str, bool]:
    """Return the verdicts about a picture: shapes, colours, relation, and all of these.

    Shapes and colours are counted separately. The relation also depends on which colour belongs to
    which shape.

    Args:
        seen: Scene read in the picture.
        said: Scene that the caption describes.
    """
    result = {
        "shapes": list_values(seen, "shape") == list_values(said, "shape"),
        "colours": list_values(seen, "colour") == list_values(said, "colour"),
        "relation": has_same_relation(seen, said),
    }
    return {**result, "all": all(result.values())}


def list_values(scene: Scene, attribute: str) -> list[str]:
    """Return an attribute of all objects, sorted."""
    return sorted(getattr(thing, attribute) for thing in scene.things)


def has_same_relation(seen: Scene, said: Scene) -> bool:
    """Return True if two objects, matched by shape and colour, have the relation of the caption.

    The result is False if the match is not unique.
    """
    if len(seen.things) != len(said.things):
        return False
    if said.relation is None:
        return True
    worse, better = sorted(
        permutations(seen.things), key=partial(count_matches, others=said.things)
    )
    is_unique = count_matches(better, said.things) > count_matches(worse, said.things)
    return is_unique and find_relation(*better) == said.relation


def count_matches(things: Sequence[ShapeThing], others: Sequence[ShapeThing]) -> int:
    """Return the number of shapes and colours that agree between pairs of objects."""
    count = 0
    for thing, other in zip(things, others, strict=True):
        count += (thing.shape == other.shape) + (thing.colour == other.colour)
    return count


def find_relation(first: ShapeThing, second: ShapeThing) -> str:
    """Return the place of the first object relative to the second."""
    dx, dy = first.x - second.x, first.y - second.y
    return max(RELATIONS, key=lambda name: RELATIONS[name][0] * dx + RELATIONS[name][1] * dy)


def read_scene(image: Float[Tensor, "3 h w"]) -> Scene:
    """Return the scene of a picture in [0, 1], with any number of objects.

    It has a relation if there are two.
    """
    pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = find_nearest(ground, BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    things = []
    for region in list_regions(distance > VISIBLE):
        things += inspect_region(pixels, ground, region)
    relation = find_relation(*things) if len(things) == 2 else None
    return Scene(tuple(things), relation, background)


def inspect_region(pixels: np.ndarray, ground: np.ndarray, region: np.ndarray) -> list[ShapeThing]:
    """Return the objects in one connected region: mostly one, two if they touch.

    Args:
        pixels: Picture in [0, 1], (h, w, 3).
        ground: Colour of the background, (3,).
        region: Mask of the region, (h, w).
    """
    from scipy import ndimage  # here, because the core works without SciPy

    if region.sum() < SMALLEST:
        return []
    contrast = np.linalg.norm(pixels - ground, axis=-1) * region
    solid = region & ndimage.binary_erosion(region)
    solid = solid if solid.sum() >= SMALLEST / 3 else region
    owners = split_region(pixels, solid)
    things = []
    for owner in owners:
        core = owner & (contrast >= 0.8 * np.quantile(contrast[owner], 0.9))
        colour = np.median(pixels[core], axis=0)
        # The share of each pixel that the object covers is the position of the pixel's colour
        # between those of the background and the object.
        difference = colour - ground
        alpha = ((pixels - ground) @ difference / (difference @ difference)).clip(0, 1)
        if len(owners) > 1:
            alpha *= ndimage.binary_dilation(owner, iterations=2)
        else:
            alpha *= ndimage.binary_dilation(region)
        for solid_part in list_regions(alpha > 0.5):
            part = alpha * ndimage.binary_dilation(solid_part)
            if part.sum() >= SMALLEST:
                things.append(recognise_shape(part, find_nearest(colour, COLOURS)))
    return things


def split_region(pixels: np.ndarray, solid: np.ndarray) -> list[np.ndarray]:
    """Return the masks of two objects of different colours in a region, or of the whole region.

    It is split only if the centres are apart, because a blurred rim, which has another colour,
    surrounds its own object.
    """
    palette = np.array(list(COLOURS.values())) / 255
    names = np.full(solid.shape, -1)
    names[solid] = np.linalg.norm(pixels[solid][:, None] - palette, axis=-1).argmin(1)
    masks = sorted(((names == i) for i in range(len(COLOURS))), key=np.sum, reverse=True)[:2]
    if masks[1].sum() < SMALLEST / 2:
        return [solid]
    distance = math.dist(compute_centroid(masks[0]), compute_centroid(masks[1]))
    return masks if distance > APART else [solid]


def recognise_shape(alpha: np.ndarray, colour: str) -> ShapeThing:
    """Return the shape that overlaps most with a mask, drawn with the same area and centroid.

    Args:
        alpha: Share of each pixel that the object covers, (h, w).
        colour: Name of its colour.
    """
    x, y = compute_centroid(alpha)
    total = float(alpha.sum())
    best, overlap = ShapeThing(UNKNOWN, colour, find_size(math.sqrt(total / 3)), x, y), ALIKE
    for shape in SHAPES:
        area, cx, cy = compute_moments(shape)
        radius = math.sqrt(total / area)
        centre = x - radius * cx, y - radius * cy
        template = draw_mask(shape, *centre, radius)
        ratio = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
        if ratio > overlap:
            best, overlap = ShapeThing(shape, colour, find_size(radius), *centre), ratio
    return best


def draw_mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Return the share of each pixel (h, w) that one shape covers."""
    [mask] = compute_coverage(
        shape, torch.tensor([x]), torch.tensor([y]), torch.tensor([radius])
    ).numpy()
    return mask


@cache
def compute_moments(shape: str) -> tuple[float, float, float]:
    """Return area and centroid (x, y) of the shape of radius 1."""
    radius, middle = 20.0, SIZE / 2
    mask = draw_mask(shape, middle, middle, radius)
    x, y = compute_centroid(mask)
    return float(mask.sum()) / radius**2, (x - middle) / radius, (y - middle) / radius


def compute_centroid(alpha: np.ndarray) -> tuple[float, float]:
    """Return (x, y) in pixels; the centre of the first pixel is at 0.5."""
    mass = alpha / alpha.sum()
    height, width = alpha.shape
    x = float((np.arange(width) + 0.5) @ mass.sum(0))
    y = float((np.arange(height) + 0.5) @ mass.sum(1))
    return x, y


def list_regions(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected regions of a mask; neighbours share an edge."""
    from scipy import ndimage

    label, number = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues]
    return [label == i for i in range(1, number + 1)]


def find_size(radius: float) -> str:
    """Return the size whose radius is nearest."""
    return min(RADII, key=lambda name: abs(RADII[name] - radius))


def find_nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the name of the colour of the palette that is nearest."""
    return min(palette, key=lambda name: ((rgb * 255 - palette[name]) ** 2).sum())
