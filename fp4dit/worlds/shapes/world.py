"""A world of coloured shapes on flat backgrounds, rendered from signed distances.

The world is small enough for a model of a few million parameters to learn on a laptop, and yet
compositional: only the caption says which shape has which colour and size, and where it lies.
"""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fp4dit.worlds.base import RELATIONS, Placement, Scene, World
from fp4dit.worlds.shapes.drawing import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SIZE,
    ShapeThing,
    paint_shape,
    stack_colours,
)
from fp4dit.worlds.shapes.oracle import compare_scenes, read_scene


class ShapesWorld(World):
    """Six shapes in eight colours, on four flat backgrounds.

    Example:
        >>> world = ShapesWorld()
        >>> picture = world.render_scenes([next(world.iterate_scenes(seed=0, held_out=True))])
    """

    name = "shapes"
    image_size = SIZE
    attributes: ClassVar = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "size": tuple(RADII)}
    kinds = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
    sizes = tuple(RADII)
    backgrounds = tuple(BACKGROUNDS)
    placement = Placement(along=(14.0, 18.0), across=6.0, lone=7.0)
    verdicts = ("shapes", "colours", "relation", "all")

    @property
    def vocabulary(self) -> list[str]:
        """The words in the order of the tokenizer that ships."""
        phrases = [*RADII, *COLOURS, *SHAPES, *RELATIONS, *BACKGROUNDS, "a on background"]
        return list(dict.fromkeys(" ".join(phrases).split()))

    def make_thing(self, kind: str, size: str, x: float, y: float) -> ShapeThing:
        colour, shape = kind.split()
        return ShapeThing(shape, colour, size, x, y)

    def render_scenes(self, batch: Sequence[Scene]) -> Float[Tensor, "n 3 h w"]:
        image = stack_colours([BACKGROUNDS[scene.background] for scene in batch])
        image = image.expand(-1, -1, SIZE, SIZE).clone()
        for shape in SHAPES:
            objects = []
            for i, scene in enumerate(batch):
                objects += [(i, thing) for thing in scene.things if thing.shape == shape]
            # If a scene has a shape twice, the two are neighbours in `objects`. They are painted in
            # different turns.
            for turn in (objects[::2], objects[1::2]):
                if turn:
                    paint_shape(image, shape, turn)
        return image

    def judge_images(
        self, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]
    ) -> dict[str, list[bool]]:
        return self.judge_readings(map(read_scene, images), captions, compare_scenes)
