"""The oracle reads what was drawn, also through blur and noise, and is not talked into anything."""

from itertools import islice
from random import Random

import pytest
import torch
from torch.nn import functional as F

from fp4dit.worlds import Scene, ShapesWorld
from fp4dit.worlds.shapes import ShapeThing
from fp4dit.worlds.shapes.drawing import RADII, compute_coverage
from fp4dit.worlds.shapes.oracle import UNKNOWN, compare_scenes, read_scene

WORLD = ShapesWorld()

N = 100  # of 2,000, the oracle is right on all; a test should be quick


@pytest.fixture(scope="module")
def truth():
    batch = [
        *islice(WORLD.iterate_scenes(11, True), N // 2),
        *islice(WORLD.iterate_scenes(12, False), N // 2),
    ]
    return batch, WORLD.render_scenes(batch) / 2 + 0.5


def blur(images):
    line = torch.tensor([1.0, 2.0, 1.0])
    kernel = (line[:, None] * line / 16).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, [1] * 4, mode="replicate"), kernel, groups=3)


def noise(sigma):
    return lambda x: (
        x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 1)


def codec(images):
    """Halve the resolution and restore it, as a lossy autoencoder might."""
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(
    "change",
    [lambda x: x, blur, noise(0.02), lambda x: noise(0.02)(blur(x))],
    ids=["as drawn", "blur", "noise", "both"],
)
def test_the_oracle_reads_rendered_pictures(truth, change):
    batch, images = truth
    seen = [read_scene(image) for image in change(images)]
    assert sum(compare_scenes(a, b)["all"] for a, b in zip(seen, batch, strict=True)) >= 0.99 * N
    assert sum(a.background == b.background for a, b in zip(seen, batch, strict=True)) >= 0.99 * N
    sizes = [
        sorted(t.size for t in a.things) == sorted(t.size for t in b.things)
        for a, b in zip(seen, batch, strict=True)
    ]
    assert sum(sizes) >= 0.99 * N


def test_colours_and_places_survive_strong_blur(truth):
    batch, images = truth
    verdicts = WORLD.judge_images(codec(images), [scene.caption for scene in batch])
    assert sum(verdicts["colours"]) >= 0.99 * N
    assert sum(verdicts["shapes"]) >= 0.9 * N


def test_centres_are_found(truth):
    batch, images = truth
    for scene, image in zip(batch[:50], images, strict=False):
        places = sorted((t.x, t.y) for t in scene.things)
        seen = sorted((t.x, t.y) for t in read_scene(image).things)
        assert seen == [pytest.approx(place, abs=1.0) for place in places]


def test_shuffled_captions_are_near_chance(truth):
    batch, images = truth
    captions = Random(0).sample([scene.caption for scene in batch], N)
    verdicts = WORLD.judge_images(images, captions)
    assert sum(verdicts["all"]) <= 0.03 * N
    assert sum(verdicts["shapes"]) <= 0.15 * N
    assert sum(verdicts["colours"]) <= 0.1 * N


def test_binding_counts():
    seen = Scene(
        (
            ShapeThing("circle", "blue", "small", 16.0, 32.0),
            ShapeThing("square", "red", "small", 48.0, 32.0),
        ),
        "to the left of",
        "white",
    )
    said = WORLD.parse_caption(
        "a small red circle to the left of a small blue square on a white background"
    )
    assert compare_scenes(seen, said) == {
        "shapes": True,
        "colours": True,
        "relation": False,
        "all": False,
    }


def test_both_orders_of_a_relation_are_the_same_scene(truth):
    inverse = {
        "above": "below",
        "below": "above",
        "to the left of": "to the right of",
        "to the right of": "to the left of",
    }
    pairs = [(s, i) for s, i in zip(*truth, strict=True) if s.relation][:20]
    turned = [Scene(s.things[::-1], inverse[s.relation], s.background).caption for s, _ in pairs]
    assert all(WORLD.judge_images(torch.stack([i for _, i in pairs]), turned)["all"])
    wrong = [Scene(s.things[::-1], s.relation, s.background).caption for s, _ in pairs]
    assert not any(WORLD.judge_images(torch.stack([i for _, i in pairs]), wrong)["relation"])


def test_empty_noisy_and_foreign_pictures():
    assert read_scene(torch.full((3, 64, 64), 0.95)).things == ()
    wild = read_scene(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert all(t.shape == UNKNOWN for t in wild.things)
    dumbbell = torch.full((1, 64, 64), 0.0)
    for x in (14.0, 50.0):
        dumbbell = dumbbell.maximum(
            compute_coverage("circle", *(torch.tensor([v]) for v in (x, 32.0, 8.0)))
        )
    dumbbell[:, 31:33, 14:50] = 1
    red = torch.tensor([222, 45, 38.0]).view(3, 1, 1) / 255
    thing = read_scene(torch.lerp(torch.full((3, 64, 64), 0.95), red, dumbbell)).things[0]
    assert (thing.shape, thing.colour) == (UNKNOWN, "red")


def test_touching_objects_are_separated():
    things = (
        ShapeThing("diamond", "red", "large", 32.0, 18.5),
        ShapeThing("triangle", "blue", "large", 32.0, 46.0),
    )
    scene = Scene(things, "above", "white")
    seen = read_scene(WORLD.render_scenes([scene])[0] / 2 + 0.5)
    assert compare_scenes(seen, scene)["all"]
    assert (
        max(
            abs(a.y - b.y)
            for a, b in zip(sorted(seen.things, key=lambda t: t.y), things, strict=True)
        )
        < 1
    )
    assert {t.size for t in seen.things} == {"large"} <= set(RADII)
