"""The oracle of the emoji world: what its network answers becomes verdicts."""

import math

import pytest
import torch

from fp4dit.worlds import PLACES, EmojiWorld
from fp4dit.worlds.emoji.oracle import UNKNOWN, Reading, SceneReader, compare_reading, read_answers

WORLD = EmojiWorld()
LEFT, RIGHT, ABOVE, MIDDLE = 0, 1, 2, 4
SAID = WORLD.parse_caption(
    "a large otter to the left of a small slice of pizza on a blue background"
)


def answer(choices: dict[int, int], probability: float = 0.99) -> torch.Tensor:
    """Return logits that give this probability to the choice of each question, by its number."""
    parts = []
    for question, size in enumerate(WORLD.slot_choices):
        logits = torch.full((size,), math.log((1 - probability) / (size - 1)))
        logits[choices.get(question, 0)] = math.log(probability)
        parts.append(logits)
    return torch.cat(parts)


def test_answers_become_emoji_places_and_a_background():
    assert PLACES[LEFT] == (-1, 0)
    questions = {2 * LEFT: 1, 2 * RIGHT: 25, 2 * len(PLACES): 3}
    reading = read_answers(WORLD, answer(questions))
    assert reading == Reading({LEFT: "otter", RIGHT: "slice of pizza"}, "blue")
    assert all(compare_reading(reading, SAID).values())


def test_an_unsure_network_reads_something_unknown():
    logits = answer({2 * MIDDLE: 1}, probability=0.4)
    assert read_answers(WORLD, logits).emoji[MIDDLE] == UNKNOWN


@pytest.mark.parametrize(
    ("emoji", "background", "expected"),
    [
        ({LEFT: "otter", RIGHT: "slice of pizza"}, "pink", (True, False, True)),
        ({RIGHT: "otter", LEFT: "slice of pizza"}, "blue", (True, True, False)),
        ({LEFT: "otter", RIGHT: "fox"}, "blue", (False, True, True)),
        ({LEFT: "owl", RIGHT: "fox"}, "blue", (False, True, False)),
        ({ABOVE: "otter", RIGHT: "slice of pizza"}, "blue", (True, True, False)),
        ({MIDDLE: "otter"}, "blue", (False, True, False)),
        ({}, "blue", (False, True, False)),
    ],
)
def test_verdicts(emoji, background, expected):
    verdict = compare_reading(Reading(emoji, background), SAID)
    assert tuple(verdict.values()) == (*expected, all(expected))
    assert tuple(verdict) == WORLD.verdicts


def test_a_lone_object_must_be_in_the_middle():
    said = WORLD.parse_caption("a large otter on a blue background")
    assert compare_reading(Reading({MIDDLE: "otter"}, "blue"), said)["all"]
    assert not compare_reading(Reading({LEFT: "otter"}, "blue"), said)["relation"]


def test_the_network_answers_every_question():
    assert SceneReader(WORLD.slot_choices)(torch.zeros(2, 3, 64, 64)).shape == (
        2,
        sum(WORLD.slot_choices),
    )
