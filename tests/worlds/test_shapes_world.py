"""The shapes world: what is held out stays out, pictures are as captions say."""

from itertools import islice
from random import Random

import pytest
import torch

from fp4dit.pretraining import SceneStream
from fp4dit.pretraining.architecture import build_tokenizer
from fp4dit.pretraining.data import derive_seed
from fp4dit.worlds import RELATIONS, Scene, ShapesWorld
from fp4dit.worlds.shapes import ShapeThing
from fp4dit.worlds.shapes.drawing import BACKGROUNDS, COLOURS, RADII, SHAPES, SIZE, compute_coverage

WORLD = ShapesWorld()


@pytest.mark.parametrize("contrast", [False, True])
def test_training_never_sees_a_held_out_combination(contrast):
    batches = islice(iter(SceneStream(WORLD, 64, seed=3, contrast=contrast)), 8)
    assert not any(
        WORLD.parse_caption(caption).held_out for batch in batches for caption in batch.captions
    )


def test_a_tenth_of_the_combinations_is_held_out():
    """Order, size, relation and background of two objects do not matter."""
    rng, stream = Random(0), WORLD.iterate_scenes(1, held_out=True)
    for scene in islice(stream, 200):
        if len(scene.things) == 2:
            other = Scene(
                scene.things[::-1], rng.choice(list(RELATIONS)), rng.choice(list(BACKGROUNDS))
            )
            assert other.held_out
    share = sum(scene.held_out for scene in draw_scenes(2000)) / 2000
    assert 0.07 < share < 0.14


def draw_scenes(n):
    rng = Random(5)
    return [WORLD.draw_scene(rng) for _ in range(n)]


def test_captions_parse_back_and_fit_the_tokenizer():
    words = build_tokenizer(WORLD)
    for scene in draw_scenes(300):
        said = WORLD.parse_caption(scene.caption)
        assert said.caption == scene.caption
        assert said.held_out == scene.held_out
        ids = words(scene.caption).input_ids
        assert len(ids) <= WORLD.tokens
        assert words.unk_token_id not in ids


@pytest.mark.parametrize(
    "caption", ["", "a red circle", "a dog on a white background", "a small red circle"]
)
def test_other_texts_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption"):
        WORLD.parse_caption(caption)


def test_pictures_are_in_range_and_their_colours_right():
    batch = draw_scenes(32)
    pictures = WORLD.render_scenes(batch)
    assert pictures.shape == (32, 3, SIZE, SIZE)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    for picture, scene in zip(pictures, batch, strict=True):
        ground = torch.tensor(BACKGROUNDS[scene.background]) / 127.5 - 1
        assert torch.allclose(picture[:, 0, 0], ground, atol=1e-6)
        for thing in scene.things:
            if thing.shape != "ring":  # whose centre is the background
                colour = torch.tensor(COLOURS[thing.colour]) / 127.5 - 1
                assert torch.allclose(picture[:, int(thing.y), int(thing.x)], colour, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_antialiased_and_areas_are_exact(shape):
    """The area of a shape is the one that a grid of 16 times the resolution gives."""
    x, y, radius = 31.3, 32.6, RADII["large"]
    alpha = compute_coverage(shape, *(torch.tensor([v]) for v in (x, y, radius)))
    assert ((alpha > 0.02) & (alpha < 0.98)).sum() > 10
    axis = torch.arange(SIZE * 16) / 16 + 1 / 32
    inside = SHAPES[shape]((axis.view(1, -1) - x) / radius, (axis.view(-1, 1) - y) / radius) < 0
    assert alpha.sum().item() == pytest.approx(inside.float().sum().item() / 256, rel=0.02)


def test_two_objects_keep_their_relation_and_never_overlap():
    for scene in draw_scenes(400):
        if scene.relation:
            first, second = scene.things
            across = RELATIONS[scene.relation]
            along = (first.x - second.x) * across[0] + (first.y - second.y) * across[1]
            aside = abs((first.x - second.x) * across[1]) + abs((first.y - second.y) * across[0])
            assert along >= 28
            assert along > 2 * aside
            masks = [
                compute_coverage(t.shape, *(torch.tensor([v]) for v in (t.x, t.y, RADII[t.size])))
                for t in scene.things
            ]
            assert (masks[0] * masks[1]).sum() < 1


def test_a_variant_differs_in_one_word_or_the_places():
    rng, changed = Random(7), 0
    for scene in draw_scenes(300):
        other = WORLD.vary_scene(scene, rng)
        before, after = scene.caption.split(), other.caption.split()
        differing = sum(a != b for a, b in zip(before, after, strict=False))
        swapped = sorted(before) == sorted(after)
        related = scene.relation != other.relation
        assert differing <= 1 or swapped or related
        changed += before != after
    assert changed > 150


def test_streams_are_reproducible_and_seeds_differ():
    """Streams of one seed are equal; seeds of processes and of resumed trainings differ."""
    same = [scene.caption for scene in islice(WORLD.iterate_scenes(4, False), 20)]
    assert same == [scene.caption for scene in islice(WORLD.iterate_scenes(4, False), 20)]
    assert len({derive_seed(0, rank, step) for rank in range(8) for step in (0, 200, 400)}) == 24


def test_a_shape_may_occur_twice():
    things = (
        ShapeThing("circle", "red", "small", 16.0, 32.0),
        ShapeThing("circle", "blue", "small", 48.0, 32.0),
    )
    picture = WORLD.render_scenes([Scene(things, "to the left of", "white")])[0]
    for thing in things:
        assert torch.allclose(
            picture[:, 32, int(thing.x)], torch.tensor(COLOURS[thing.colour]) / 127.5 - 1, atol=1e-6
        )
