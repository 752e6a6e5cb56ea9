"""The metric of flicker has the values of closed forms."""

import pytest
import torch

from fp4dit.evaluation.score import score_frames
from fp4dit.metrics import PSNR, Flicker
from fp4dit.utils.errors import UserError

SIZE = (2, 6, 3, 8, 8)  # two videos of six frames
PROMPTS = ["a fox", "a boat"]


@pytest.fixture
def reference() -> torch.Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(0))


def test_an_error_that_stays_does_not_flicker(reference: torch.Tensor):
    error = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    flicker = Flicker().score(reference + error, reference, PROMPTS)
    torch.testing.assert_close(flicker, torch.zeros(2), atol=1e-6, rtol=0)


def test_an_error_that_changes_its_sign_counts_twice(reference: torch.Tensor):
    signs = torch.tensor([1.0, -1.0] * 3).reshape(1, 6, 1, 1, 1)
    sizes = torch.tensor([0.1, 0.02]).reshape(2, 1, 1, 1, 1)
    flicker = Flicker().score(reference + sizes * signs, reference, PROMPTS)
    torch.testing.assert_close(flicker, torch.tensor([0.2, 0.04]))


def test_independent_errors_count_by_the_root_of_two():
    generator = torch.Generator().manual_seed(2)
    reference = torch.rand(1, 16, 3, 64, 64, generator=generator)
    noise = 0.05 * torch.randn(reference.shape, generator=generator)
    flicker = Flicker().score(reference + noise, reference, PROMPTS[:1])
    torch.testing.assert_close(flicker, torch.tensor([0.05 * 2**0.5]), rtol=0.01, atol=0)


def test_a_video_that_plays_backwards_flickers_as_much(reference: torch.Tensor):
    """The formula is symmetric in time, and in the two videos."""
    other = torch.rand(SIZE, generator=torch.Generator().manual_seed(3))
    flicker = Flicker().score(other, reference, PROMPTS)
    backwards = Flicker().score(other.flip(1), reference.flip(1), PROMPTS)
    torch.testing.assert_close(backwards, flicker)
    torch.testing.assert_close(Flicker().score(reference, other, PROMPTS), flicker)


def test_images_have_no_flicker(reference: torch.Tensor):
    with pytest.raises(UserError, match="Flicker compares the frames of videos, and these are im"):
        score_frames(Flicker(), reference[:, 0], reference[:, 0], PROMPTS)


def test_frames_are_scored_in_parts(reference: torch.Tensor):
    """A long video has the mean of its frames, however many fit into a batch."""
    long = reference.repeat(1, 4, 1, 1, 1)  # 24 frames
    other = torch.rand(long.shape, generator=torch.Generator().manual_seed(4))
    expected = torch.stack([PSNR().score(a, b, []) for a, b in zip(other, long, strict=True)])
    torch.testing.assert_close(score_frames(PSNR(), other, long, PROMPTS), expected.mean(1))
