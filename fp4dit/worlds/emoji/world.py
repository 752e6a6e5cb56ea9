"""A world of emoji on softly shaded backgrounds, rendered from real artwork."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.utils.hub import resolve_package_path
from fp4dit.worlds.base import Placement, Scene, Thing, World
from fp4dit.worlds.emoji.artwork import Sprite, read_sprites
from fp4dit.worlds.emoji.oracle import ORACLE, SceneReader, judge_images, load_reader

SIZE = 64  # pixels, both ways
SCALE = 2  # scenes are composed at this multiple of their size, and then reduced
LENGTHS = {"small": 22, "large": 30}  # pixels, of the artwork's square canvas
SHADE = 0.10  # backgrounds are lighter by this at the top and darker at the bottom

BACKGROUNDS = {
    "white": (238, 238, 240),
    "gray": (140, 143, 150),
    "black": (34, 34, 40),
    "blue": (116, 178, 240),
    "green": (132, 200, 132),
    "yellow": (246, 222, 128),
    "pink": (246, 170, 200),
    "purple": (150, 112, 200),
}

# The noun phrase for each emoji in captions, and its short name in the artwork's emoji.json.
EMOJI = {
    "otter": "otter",
    "fox": "fox_face",
    "frog": "frog",
    "panda": "panda_face",
    "pig": "pig",
    "penguin": "penguin",
    "flamingo": "flamingo",
    "octopus": "octopus",
    "crab": "crab",
    "whale": "whale",
    "turtle": "turtle",
    "ladybug": "ladybug",
    "butterfly": "butterfly",
    "bee": "bee",
    "snail": "snail",
    "owl": "owl",
    "parrot": "parrot",
    "lion": "lion_face",
    "elephant": "elephant",
    "unicorn": "unicorn_face",
    "tropical fish": "tropical_fish",
    "hatching chick": "hatching_chick",
    "dinosaur": "sauropod",
    "zebra": "zebra_face",
    "slice of pizza": "pizza",
    "hamburger": "hamburger",
    "box of fries": "fries",
    "doughnut": "doughnut",
    "ice cream": "icecream",
    "slice of watermelon": "watermelon",
    "strawberry": "strawberry",
    "banana": "banana",
    "pineapple": "pineapple",
    "avocado": "avocado",
    "broccoli": "broccoli",
    "carrot": "carrot",
    "eggplant": "eggplant",
    "pair of cherries": "cherries",
    "cupcake": "cupcake",
    "bag of popcorn": "popcorn",
    "wedge of cheese": "cheese_wedge",
    "rocket": "rocket",
    "tractor": "tractor",
    "taxi": "taxi",
    "bus": "bus",
    "sailboat": "boat",
    "flying saucer": "flying_saucer",
    "steam locomotive": "steam_locomotive",
    "balloon": "balloon",
    "umbrella": "umbrella",
    "crown": "crown",
    "guitar": "guitar",
    "gift": "gift",
    "soccer ball": "soccer",
    "alarm clock": "alarm_clock",
    "magnet": "magnet",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "mushroom": "mushroom",
    "palm tree": "palm_tree",
    "ghost": "ghost",
    "robot": "robot_face",
    "pumpkin": "jack_o_lantern",
    "face with sunglasses": "sunglasses",
}


@dataclass(frozen=True)
class EmojiThing(Thing):
    """An emoji in a scene.

    Args:
        emoji: Noun for the emoji, a key of `EMOJI`.
        size: Word for the size, a key of `LENGTHS`.
        x: Centre in pixels, from the left.
        y: Centre in pixels, from the top.

    Example:
        >>> describe_thing(EmojiThing("slice of pizza", "large", x=32.0, y=32.0))
        'a large slice of pizza'
    """

    emoji: str
    size: str
    x: float
    y: float

    @property
    def kind(self) -> str:
        return self.emoji


class EmojiWorld(World):
    """64 emoji on eight backgrounds.

    Args:
        artwork: Folder of the unpacked npm package; only rendering needs it.
        oracle_path: File of the oracle's network; None for the one that ships.

    Example:
        >>> world = EmojiWorld(artwork="package")
        >>> scene = next(world.iterate_scenes(seed=0, held_out=True))
        >>> picture = world.render_scenes([scene])
    """

    name = "emoji"
    image_size = SIZE
    attributes: ClassVar = {"emoji": tuple(EMOJI), "size": tuple(LENGTHS)}
    kinds = tuple(EMOJI)
    sizes = tuple(LENGTHS)
    backgrounds = tuple(BACKGROUNDS)
    # The grid is a token of the transformer. Positions off it take many times as long to learn.
    placement = Placement(along=(16.0, 16.0), across=8.0, lone=8.0, grid=8.0)
    verdicts = ("emoji", "background", "relation", "all")

    def __init__(self, artwork: str | None = None, oracle_path: str | None = None) -> None:
        self.artwork, self.oracle_path = artwork, oracle_path

    @property
    def sprites(self) -> Mapping[tuple[str, str], Sprite]:
        """The artwork at SCALE times its size, by (kind, size)."""
        pixels = [(size, SCALE * length) for size, length in LENGTHS.items()]
        return read_sprites(self.artwork, tuple(EMOJI.items()), tuple(pixels))

    def make_thing(self, kind: str, size: str, x: float, y: float) -> EmojiThing:
        return EmojiThing(kind, size, x, y)

    def render_scenes(self, batch: Sequence[Scene]) -> Float[Tensor, "n 3 h w"]:
        sprites = self.sprites
        image = torch.stack([shade_background(scene.background) for scene in batch])
        for picture, scene in zip(image, batch, strict=True):
            for thing in scene.things:
                sprite = sprites[thing.emoji, thing.size]
                paste_sprite(picture, sprite, SCALE * thing.x, SCALE * thing.y)
        return F.avg_pool2d(image, SCALE) * 2 - 1

    def build_reader(self) -> nn.Module:
        """Return the oracle's network, untrained."""
        return SceneReader(self.slot_choices)

    def judge_images(
        self, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]
    ) -> dict[str, list[bool]]:
        path = self.weights / ORACLE
        if self.oracle_path:
            path = Path(resolve_package_path(self.oracle_path))
        return judge_images(self, load_reader(path, self.slot_choices), images, captions)


@cache
def shade_background(name: str) -> Float[Tensor, "3 h w"]:
    """Return a background in [0, 1] at SCALE times its size, lighter at the top."""
    length = SCALE * SIZE
    height = 1 - 2 * (torch.arange(length) + 0.5) / length  # 1 at the top, -1 at the bottom
    colour = torch.tensor(BACKGROUNDS[name]).view(3, 1, 1) / 255
    return (colour * (1 + SHADE * height.view(1, -1, 1))).clamp(0, 1).repeat(1, 1, length)


def paste_sprite(picture: Float[Tensor, "3 h w"], sprite: Sprite, x: float, y: float) -> None:
    """Composite a sprite over the picture in place, centred at the pixels nearest to (x, y)."""
    length = sprite.shape[-1]
    top, left = round(y - length / 2), round(x - length / 2)
    area = picture[:, top : top + length, left : left + length]
    area.mul_(1 - sprite[3]).add_(sprite[:3])
