"""The oracle reads what was drawn, also through blur and noise, and is not talked into anything."""

from itertools import islice
from random import Random

import pytest
import torch
from torch.nn import functional as F

from fp4dit.models.shapes.oracle import UNKNOWN, judge, parse, read, verdict
from fp4dit.models.shapes.world import RADII, Scene, Thing, coverage, render, scenes

N = 100  # of 2,000, the oracle is right on all; a test should be quick


@pytest.fixture(scope="module")
def truth():
    batch = [*islice(scenes(11, True), N // 2), *islice(scenes(12, False), N // 2)]
    return batch, render(batch) / 2 + 0.5


def blur(images):
    line = torch.tensor([1.0, 2.0, 1.0])
    kernel = (line[:, None] * line / 16).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, [1] * 4, mode="replicate"), kernel, groups=3)


def noise(sigma):
    return lambda x: (x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def codec(images):
    """As an autoencoder does it: half the resolution and back."""
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(
    "change",
    [lambda x: x, blur, noise(0.02), lambda x: noise(0.02)(blur(x))],
    ids=["as drawn", "blur", "noise", "both"],
)
def test_reads_what_was_drawn(truth, change):
    batch, images = truth
    seen = [read(image) for image in change(images)]
    assert sum(verdict(a, b)["all"] for a, b in zip(seen, batch, strict=True)) >= 0.99 * N
    assert sum(a.background == b.background for a, b in zip(seen, batch, strict=True)) >= 0.99 * N
    sizes = [
        sorted(t.size for t in a.things) == sorted(t.size for t in b.things) for a, b in zip(seen, batch, strict=True)
    ]
    assert sum(sizes) >= 0.99 * N


def test_colours_and_places_survive_what_rounds_small_shapes(truth):
    batch, images = truth
    verdicts = judge(codec(images), [scene.caption for scene in batch])
    assert sum(verdicts["colours"]) >= 0.99 * N
    assert sum(verdicts["shapes"]) >= 0.9 * N


def test_centres_are_found(truth):
    batch, images = truth
    for scene, image in zip(batch[:50], images, strict=False):
        places = sorted((t.x, t.y) for t in scene.things)
        seen = sorted((t.x, t.y) for t in read(image).things)
        assert seen == [pytest.approx(place, abs=1.0) for place in places]


def test_shuffled_captions_are_near_chance(truth):
    batch, images = truth
    captions = Random(0).sample([scene.caption for scene in batch], N)
    verdicts = judge(images, captions)
    assert sum(verdicts["all"]) <= 0.03 * N
    assert sum(verdicts["shapes"]) <= 0.15 * N
    assert sum(verdicts["colours"]) <= 0.1 * N


def test_binding_counts():
    seen = Scene(
        (Thing("circle", "blue", "small", 16.0, 32.0), Thing("square", "red", "small", 48.0, 32.0)),
        "to the left of",
        "white",
    )
    said = parse("a small red circle to the left of a small blue square on a white background")
    assert verdict(seen, said) == {"shapes": True, "colours": True, "relation": False, "all": False}


def test_either_order_of_a_relation_is_the_same_scene(truth):
    inverse = {
        "above": "below",
        "below": "above",
        "to the left of": "to the right of",
        "to the right of": "to the left of",
    }
    pairs = [(s, i) for s, i in zip(*truth, strict=True) if s.relation][:20]
    turned = [Scene(s.things[::-1], inverse[s.relation], s.background).caption for s, _ in pairs]
    assert all(judge(torch.stack([i for _, i in pairs]), turned)["all"])
    wrong = [Scene(s.things[::-1], s.relation, s.background).caption for s, _ in pairs]
    assert not any(judge(torch.stack([i for _, i in pairs]), wrong)["relation"])


def test_nothing_noise_and_other_things():
    assert read(torch.full((3, 64, 64), 0.95)).things == ()
    wild = read(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert all(t.shape == UNKNOWN for t in wild.things)
    dumbbell = torch.full((1, 64, 64), 0.0)
    for x in (14.0, 50.0):
        dumbbell = dumbbell.maximum(coverage("circle", *(torch.tensor([v]) for v in (x, 32.0, 8.0))))
    dumbbell[:, 31:33, 14:50] = 1
    red = torch.tensor([222, 45, 38.0]).view(3, 1, 1) / 255
    thing = read(torch.lerp(torch.full((3, 64, 64), 0.95), red, dumbbell)).things[0]
    assert (thing.shape, thing.colour) == (UNKNOWN, "red")


def test_touching_things_are_told_apart():
    things = (Thing("diamond", "red", "large", 32.0, 18.5), Thing("triangle", "blue", "large", 32.0, 46.0))
    scene = Scene(things, "above", "white")
    seen = read(render([scene])[0] / 2 + 0.5)
    assert verdict(seen, scene)["all"]
    assert max(abs(a.y - b.y) for a, b in zip(sorted(seen.things, key=lambda t: t.y), things, strict=True)) < 1
    assert {t.size for t in seen.things} == {"large"} <= set(RADII)
