"""The interface of a world, and the code that all worlds share.

A world draws scenes of one or two objects on a background. A caption says everything about a scene
except the exact positions, so a model that reads the caption can be judged by the picture it draws.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

# Unit vector from the second object to the first; y points down, as in the picture.
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
# Directions from the picture's centre to an object's place; the last place is the centre.
PLACES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
# Combinations are held out if the first byte of their hash is below this: a tenth of all.
HELD_OUT = 26


class Thing(ABC):
    """An object of a scene.

    Subclasses are dataclasses with these fields and one for each further attribute.

    Attributes:
        size: Word for the size.
        x: Centre in pixels, from the left.
        y: Centre in pixels, from the top.

    Example:
        >>> describe_thing(ShapeThing("circle", "red", "small", x=32.0, y=32.0))
        'a small red circle'
    """

    size: str
    x: float
    y: float

    @property
    @abstractmethod
    def kind(self) -> str:
        """The noun phrase for the object in captions, without its size: "slice of pizza"."""


def describe_thing(thing: Thing) -> str:
    """Return the words for an object in a caption."""
    return f"a {thing.size} {thing.kind}"


@dataclass(frozen=True)
class Scene:
    """The content of a picture and of its caption.

    Attributes:
        things: One or two objects, of the world's own class.
        relation: Place of the first object relative to the second; None for one object.
        background: Name of the background.

    Example:
        >>> scene = next(ShapesWorld().iterate_scenes(seed=0, held_out=False))
        >>> scene.caption
        'a small red circle above a large blue ring on a white background'
    """

    things: tuple[Any, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        phrases = [describe_thing(thing) for thing in self.things]
        return f" {self.relation} ".join(phrases) + f" on a {self.background} background"

    @property
    def places(self) -> tuple[int, ...]:
        """The index in PLACES of each object's place."""
        if self.relation is None:
            return (PLACES.index((0, 0)),)
        dx, dy = RELATIONS[self.relation]
        return PLACES.index((dx, dy)), PLACES.index((-dx, -dy))

    @property
    def held_out(self) -> bool:
        """True if this combination of objects is kept for evaluation.

        A tenth of all combinations of two kinds is held out, whatever their sizes, order, relation
        and background. A lone object is combined with its size and background instead.
        """
        words = sorted(thing.kind for thing in self.things)
        if len(words) == 1:
            words += [self.things[0].size, self.background]
        return hashlib.sha256(" ".join(words).encode()).digest()[0] < HELD_OUT


@dataclass(frozen=True)
class Placement:
    """Ranges in pixels that object centres are drawn from, relative to the picture's centre."""

    along: tuple[float, float]  # distance from the centre, in the direction of the relation
    across: float  # largest offset at a right angle to it
    lone: float  # largest offset of a lone object, both ways
    grid: float | None = None  # distances are rounded to multiples of it

    def draw_distance(self, rng: Random, low: float, high: float) -> float:
        """Return a random distance between two others, on the grid if there is one."""
        distance = rng.uniform(low, high)
        return distance if self.grid is None else self.grid * round(distance / self.grid)


class World(ABC):
    """Scenes, captions, pictures and the judge of one world.

    Subclasses set the class attributes and implement the abstract methods. A new world needs
    nothing else to be trained by `pipelines.pretrain`.

    Example:
        >>> world = ShapesWorld()
        >>> scene = next(world.iterate_scenes(seed=0, held_out=True))
        >>> picture = world.render_scenes([scene])
        >>> world.judge_images(picture / 2 + 0.5, [scene.caption])["all"]
        [True]
    """

    name: str
    image_size: int = 64  # pixels, both ways
    tokens: int = 20  # tokens of the longest caption, with its end mark
    attributes: ClassVar[Mapping[str, Sequence[str]]]  # choices of each field of a Thing
    kinds: Sequence[str]  # every `Thing.kind`
    sizes: Sequence[str]
    backgrounds: Sequence[str]
    placement: Placement
    verdicts: Sequence[str]  # keys of the result of `judge_images`

    @abstractmethod
    def make_thing(self, kind: str, size: str, x: float, y: float) -> Thing:
        """Return the object of this kind."""

    @abstractmethod
    def render_scenes(self, batch: Sequence[Scene]) -> Float[Tensor, "n 3 h w"]:
        """Return pictures in [-1, 1], as diffusion models take them."""

    @abstractmethod
    def judge_images(
        self, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]
    ) -> dict[str, list[bool]]:
        """Judge images against their captions.

        Args:
            images: Images in [0, 1].
            captions: Caption of this world for each image.

        Returns:
            For every name in `verdicts`, one value per image: True if it agrees with its caption.
        """

    def judge_readings(
        self,
        readings: Iterable[Any],
        captions: Sequence[str],
        compare: Callable[[Any, Scene], Mapping[str, bool]],
    ) -> dict[str, list[bool]]:
        """Judge what was read of images against their captions.

        Args:
            readings: What was read of each image.
            captions: Caption of this world for each image.
            compare: Function from a reading and a caption's scene to the verdicts by their names.

        Returns:
            The result of `judge_images`.
        """
        verdicts: dict[str, list[bool]] = {name: [] for name in self.verdicts}
        for reading, caption in zip(readings, captions, strict=True):
            for name, value in compare(reading, self.parse_caption(caption)).items():
                verdicts[name].append(value)
        return verdicts

    @property
    def weights(self) -> Path:
        """The folder of the model that ships."""
        return Path(__file__).parent / self.name / "weights"

    @property
    def vocabulary(self) -> list[str]:
        """Every word of every caption, once."""
        phrases = [*self.sizes, *self.kinds, *RELATIONS, *self.backgrounds, "a on background"]
        return list(dict.fromkeys(" ".join(phrases).split()))

    @property
    def word_choices(self) -> tuple[int, ...]:
        """The number of answers to each question about a word of a caption.

        `fp4dit.pretraining.data.label_words` answers them.
        """
        sizes = [len(choices) for choices in self.attributes.values()]
        return (*sizes, len(PLACES), len(self.backgrounds))

    @property
    def slot_choices(self) -> tuple[int, ...]:
        """The number of answers to each question about a scene.

        `fp4dit.pretraining.data.label_slots` answers them.
        """
        sizes = [len(choices) + 1 for choices in self.attributes.values()]
        return (*sizes * len(PLACES), len(self.backgrounds))

    def iterate_scenes(self, seed: int, held_out: bool) -> Iterator[Scene]:
        """Yield an endless, reproducible stream of scenes.

        Args:
            seed: Seed of the scenes.
            held_out: True for scenes kept for evaluation, False for scenes to learn from.
        """
        rng = Random(seed)
        while True:
            scene = self.draw_scene(rng)
            if scene.held_out == held_out:
                yield scene

    def draw_scene(self, rng: Random) -> Scene:
        """Return a random scene, held out or not."""
        relation = rng.choice([None, *RELATIONS])
        kinds = rng.sample(self.kinds, 1 if relation is None else 2)
        things = []
        for kind, (x, y) in zip(kinds, self.draw_centres(rng, relation), strict=True):
            things.append(self.make_thing(kind, rng.choice(self.sizes), x, y))
        return Scene(tuple(things), relation, rng.choice(self.backgrounds))

    def draw_centres(self, rng: Random, relation: str | None) -> list[tuple[float, float]]:
        """Return the objects' centres in pixels: opposite each other, never overlapping."""
        middle, reach = self.image_size / 2, self.placement
        if relation is None:
            x = middle + reach.draw_distance(rng, -reach.lone, reach.lone)
            return [(x, middle + reach.draw_distance(rng, -reach.lone, reach.lone))]
        dx, dy = RELATIONS[relation]
        centres = []
        for side in (1, -1):
            along = side * reach.draw_distance(rng, *reach.along)
            across = reach.draw_distance(rng, -reach.across, reach.across)
            centres.append((middle + dx * along + dy * across, middle + dy * along + dx * across))
        return centres

    def vary_scene(self, scene: Scene, rng: Random) -> Scene:
        """Return the scene with one word changed, or its two objects exchanged."""
        things = list(scene.things)
        index = rng.randrange(len(things))
        change = rng.choice([*self.attributes, "background", "relation", "swap"])
        if change in self.attributes:
            things[index] = replace(things[index], **{change: rng.choice(self.attributes[change])})
        elif change == "background":
            return replace(scene, background=rng.choice(self.backgrounds))
        elif scene.relation and change == "relation":
            relation = rng.choice(list(RELATIONS))
            for i, (x, y) in enumerate(self.draw_centres(rng, relation)):
                things[i] = replace(things[i], x=x, y=y)
            return replace(scene, things=tuple(things), relation=relation)
        elif scene.relation:
            first, second = things
            things = [replace(second, x=first.x, y=first.y), replace(first, x=second.x, y=second.y)]
        return replace(scene, things=tuple(things))

    def parse_caption(self, caption: str) -> Scene:
        """Return the scene that a caption describes, with positions NaN.

        Raises:
            ValueError: If the text is not a caption of this world.
        """
        match = self._pattern.fullmatch(caption)
        if match is None:
            raise ValueError(f"not a caption of the {self.name} world: {caption!r}")
        size, kind, relation, other_size, other_kind, background = match.groups()
        things = [self.make_thing(kind, size, math.nan, math.nan)]
        if relation:
            things.append(self.make_thing(other_kind, other_size, math.nan, math.nan))
        return Scene(tuple(things), relation, background)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        thing = f"a ({'|'.join(self.sizes)}) ({'|'.join(self.kinds)})"
        background = f"a ({'|'.join(self.backgrounds)}) background"
        return re.compile(f"{thing}(?: ({'|'.join(RELATIONS)}) {thing})? on {background}")
