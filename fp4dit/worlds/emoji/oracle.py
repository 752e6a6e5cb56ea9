"""Read the scene of a picture of the emoji world, by a small network trained on rendered scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.worlds.base import PLACES, Scene, World

UNKNOWN = "something"  # an object that the network is not sure about
CONFIDENCE = 0.5  # the smallest probability of an emoji that counts as read
WIDTHS = (32, 64, 128, 192)  # channels at half, quarter, eighth and sixteenth size
ORACLE = "oracle.safetensors"  # beside the other weights


class SceneReader(nn.Module):
    """Convolutional network that answers the questions of `World.slot_choices` about a picture.

    The last feature map keeps its 4 x 4 positions, because the answers depend on places.

    Args:
        choices: Number of choices of each question.

    Example:
        >>> reader = SceneReader(EmojiWorld().slot_choices)
        >>> logits = reader(torch.zeros(1, 3, 64, 64))
    """

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        self.choices = list(choices)
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(16 * channels, 256), nn.SiLU())
        self.head = nn.Linear(256, sum(choices))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        """Return the logits of all questions side by side, for images in [-1, 1]."""
        return self.head(self.hidden(self.features(images)))


@cache
def load_reader(path: Path, choices: tuple[int, ...]) -> SceneReader:
    """Return the trained network, in float32."""
    reader = SceneReader(choices)
    reader.load_state_dict(load_file(path))
    return reader.float().eval().requires_grad_(False)


@torch.no_grad()
def judge_images(
    world: World, reader: SceneReader, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]
) -> dict[str, list[bool]]:
    """Judge images in [0, 1] against their captions.

    Returns:
        For emoji, background, relation, and all of these, one value per image: True if the image
        agrees with its caption.
    """
    logits = reader(images.detach().float().cpu() * 2 - 1)
    readings = (read_answers(world, answers) for answers in logits)
    return world.judge_readings(readings, captions, compare_reading)


@dataclass(frozen=True)
class Reading:
    """What a network reads in a picture.

    Attributes:
        emoji: Emoji at each place that is not empty, by the index of the place in `PLACES`.
        background: Name of the background.
    """

    emoji: Mapping[int, str]
    background: str


def read_answers(world: World, logits: Float[Tensor, " c"]) -> Reading:
    """Return the reading of one picture from the logits of all questions."""
    parts = logits.split(list(world.slot_choices))
    names, emoji = world.attributes["emoji"], {}
    for place in range(len(PLACES)):
        probability, choice = parts[place * len(world.attributes)].softmax(0).max(0)
        if choice > 0:
            emoji[place] = names[int(choice) - 1] if probability > CONFIDENCE else UNKNOWN
    return Reading(emoji, world.backgrounds[int(parts[-1].argmax())])


def compare_reading(seen: Reading, said: Scene) -> dict[str, bool]:
    """Return the verdicts about a picture whose caption describes the scene `said`."""
    kinds = [thing.kind for thing in said.things]
    result = {
        "emoji": sorted(seen.emoji.values()) == sorted(kinds),
        "background": seen.background == said.background,
        "relation": has_places(seen, said),
    }
    return {**result, "all": all(result.values())}


def has_places(seen: Reading, said: Scene) -> bool:
    """Return True if the objects are at the places that the caption says.

    If there are two objects, more of them must be read right in this order than in the other order.
    """
    if set(seen.emoji) != set(said.places):
        return False
    if said.relation is None:
        return True
    first, second = said.places
    expected = [thing.kind for thing in said.things]
    actual = [seen.emoji[first], seen.emoji[second]]
    return count_equal(actual, expected) > count_equal(actual[::-1], expected)


def count_equal(words: Sequence[str], others: Sequence[str]) -> int:
    """Return the number of positions at which two sequences agree."""
    return sum(word == other for word, other in zip(words, others, strict=True))
