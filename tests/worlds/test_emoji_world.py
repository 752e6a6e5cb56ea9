"""The emoji world: what is held out stays out, pictures are as captions say."""

from itertools import islice
from random import Random

import numpy as np
import pytest
import torch

from fp4dit.pretraining.architecture import build_tokenizer
from fp4dit.utils.errors import UserError
from fp4dit.worlds import RELATIONS, EmojiWorld, Scene
from fp4dit.worlds.emoji import EmojiThing
from fp4dit.worlds.emoji.artwork import premultiply_alpha, resize_image
from fp4dit.worlds.emoji.world import BACKGROUNDS, EMOJI, LENGTHS, SHADE, SIZE
from tests.worlds.synthetic import color_of, write_artwork


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return EmojiWorld(str(write_artwork(tmp_path_factory.mktemp("artwork"))))


def draw_scenes(count: int) -> list[Scene]:
    rng = Random(5)
    return [EmojiWorld().draw_scene(rng) for _ in range(count)]


def test_there_are_64_emoji_and_8_backgrounds():
    assert len(EMOJI) == len(set(EMOJI.values())) == 64
    assert len(BACKGROUNDS) == 8


def test_a_tenth_of_the_pairs_is_held_out():
    pairs = 0
    for scene in islice(EmojiWorld().iterate_scenes(1, held_out=True), 300):
        if len(scene.things) == 2:
            pairs += 1
            assert Scene(scene.things[::-1], "above", "pink").held_out
    assert pairs > 200
    assert 0.08 < sum(scene.held_out for scene in draw_scenes(4000)) / 4000 < 0.12


def test_both_sides_share_no_combination():
    sides = []
    for held_out in (False, True):
        stream = islice(EmojiWorld().iterate_scenes(3, held_out), 3000)
        sides.append(
            {tuple(sorted(t.kind for t in scene.things)) for scene in stream if scene.relation}
        )
    assert len(sides[1]) > 100
    assert not sides[0] & sides[1]


def test_captions_parse_back_and_fit_the_tokenizer():
    world = EmojiWorld()
    tokenizer = build_tokenizer(world)
    for scene in draw_scenes(300):
        said = world.parse_caption(scene.caption)
        assert (said.caption, said.held_out) == (scene.caption, scene.held_out)
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) <= world.tokens
        assert tokenizer.unk_token_id not in ids
    longest = (
        "a large face with sunglasses to the right of a small slice of pizza on a yellow background"
    )
    assert len(tokenizer(longest).input_ids) <= world.tokens


def test_captions_are_plain_english():
    things = (
        EmojiThing("otter", "large", 16.0, 32.0),
        EmojiThing("slice of pizza", "small", 48.0, 32.0),
    )
    caption = Scene(things, "to the left of", "blue").caption
    assert caption == "a large otter to the left of a small slice of pizza on a blue background"


@pytest.mark.parametrize("caption", ["", "a large otter", "a large cat on a blue background"])
def test_other_texts_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption of the emoji world"):
        EmojiWorld().parse_caption(caption)


def test_the_same_seed_gives_the_same_pictures(world):
    batches = [list(islice(world.iterate_scenes(4, False), 8)) for _ in range(2)]
    assert torch.equal(*(world.render_scenes(batch) for batch in batches))


def test_backgrounds_are_lighter_at_the_top(world):
    for name, colour in BACKGROUNDS.items():
        picture = world.render_scenes(
            [Scene((EmojiThing("owl", "small", 32.0, 32.0),), None, name)]
        )[0]
        column = (picture[:, :, 0] + 1) / 2
        height = 1 - 2 * (torch.arange(SIZE) + 0.5) / SIZE
        expected = torch.tensor(colour)[:, None] / 255 * (1 + SHADE * height)
        assert torch.allclose(column[:, 20:], expected[:, 20:].clamp(0, 1), atol=1e-4)
        assert (column.diff(dim=1) <= 1e-6).all()


def test_compositing_equals_the_closed_form(world):
    """An opaque centre hides the background; a rim of alpha 128 / 255 mixes the colours."""
    number = 37
    kind = list(EMOJI)[number]
    picture = world.render_scenes([Scene((EmojiThing(kind, "large", 32.0, 32.0),), None, "green")])[
        0
    ]
    empty = world.render_scenes([Scene((EmojiThing(kind, "small", 15.0, 15.0),), None, "green")])[0]
    colour = torch.tensor(color_of(number)) / 127.5 - 1
    assert torch.allclose(picture[:, 32, 32], colour, atol=1e-5)
    rim = 32 + round(25 / 64 * LENGTHS["large"])  # halfway between the two radii
    alpha = 128 / 255
    expected = alpha * colour + (1 - alpha) * empty[:, 32, rim]
    assert torch.allclose(picture[:, 32, rim], expected, atol=0.02)


def test_transparent_pixels_add_no_colour():
    """However bright they are in the file, they stay out of the resized image."""
    image = np.ones((64, 64, 4), np.float32)
    image[:, :32] = (0, 0, 0, 1)
    image[:, 32:, 3] = 0
    sprite = resize_image(premultiply_alpha(image), 44)
    assert sprite[:3].max() == 0
    assert (sprite[:3] <= sprite[3]).all()


def test_objects_keep_their_relation_and_never_overlap():
    for scene in draw_scenes(400):
        for thing in scene.things:
            assert LENGTHS[thing.size] / 2 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= SIZE - LENGTHS[thing.size] / 2
            assert thing.x % 8 == thing.y % 8 == 0
        if scene.relation:
            first, second = scene.things
            dx, dy = RELATIONS[scene.relation]
            along = (first.x - second.x) * dx + (first.y - second.y) * dy
            assert along >= (LENGTHS[first.size] + LENGTHS[second.size]) / 2


def test_missing_artwork_gets_one_message(tmp_path):
    for world in (EmojiWorld(), EmojiWorld(str(tmp_path))):
        with pytest.raises(UserError, match="npm pack emoji-datasource-google@16"):
            world.render_scenes(draw_scenes(1))
