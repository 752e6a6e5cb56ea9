"""Metrics against independent formulas, one value per image whatever the batches."""

import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fp4dit.metrics.clip import ClipScore
from fp4dit.metrics.oracle import OracleAccuracy
from fp4dit.metrics.psnr import Psnr
from fp4dit.metrics.ssim import Ssim
from fp4dit.models.shapes.build import clip, tokenizer
from fp4dit.models.shapes.clip import save_clip
from fp4dit.models.shapes.world import Scene, Thing, render, scenes

PROMPTS = [scene.caption for _, scene in zip(range(5), scenes(0, True), strict=False)]


@pytest.fixture(scope="module")
def pairs():
    random = torch.Generator().manual_seed(0)
    reference = torch.nn.functional.interpolate(
        torch.rand(5, 3, 16, 16, generator=random), scale_factor=4, mode="bilinear"
    )
    return (reference + 0.1 * torch.randn(reference.shape, generator=random)).clamp(0, 1), reference


def in_two_batches(metric, images, reference):
    metric.update(images[:2], reference[:2], PROMPTS[:2])
    metric.update(images[2:], reference[2:], PROMPTS[2:])
    return metric.compute()


def test_psnr_is_its_formula_per_image(pairs):
    images, reference = pairs
    error = (images - reference).square().mean((1, 2, 3))
    assert torch.allclose(in_two_batches(Psnr(), *pairs), -10 * torch.log10(error), atol=1e-4)


def test_psnr_of_equal_images_is_infinite(pairs):
    assert in_two_batches(Psnr(), pairs[1], pairs[1]).tolist() == [math.inf] * 5


def ssim(a, b):
    """Wang et al., 2004, written out for one channel; scipy's filter at truncate 3.5 has the same 11 taps."""
    blur = lambda x: gaussian_filter(x, 1.5, truncate=3.5, mode="mirror")
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean()


def test_ssim_is_its_formula_per_image(pairs):
    images, reference = (x.double().numpy() for x in pairs)
    expected = [
        np.mean([ssim(a, b) for a, b in zip(*pair, strict=True)]) for pair in zip(images, reference, strict=True)
    ]
    assert in_two_batches(Ssim(), *pairs).tolist() == pytest.approx(expected, abs=2e-4)


def test_psnr_and_ssim_are_those_of_scikit_image(pairs):
    """In a grey frame, for scikit-image treats an image's border in another way."""
    framed = [torch.nn.functional.pad(side, [10] * 4, value=0.5) for side in pairs]
    images, reference = ([image.permute(1, 2, 0).double().numpy() for image in side] for side in framed)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2, "full": True}
    both = list(zip(reference, images, strict=True))
    psnr = [peak_signal_noise_ratio(*pair, data_range=1) for pair in both]
    ssim = [structural_similarity(*pair, data_range=1, **wang)[1].mean() for pair in both]
    assert in_two_batches(Psnr(), *framed).tolist() == pytest.approx(psnr, abs=1e-4)
    assert in_two_batches(Ssim(), *framed).tolist() == pytest.approx(ssim, abs=1e-4)


def test_oracle_accuracy_is_one_only_where_all_is_right():
    right = Scene((Thing("circle", "red", "small", 32.0, 32.0),), None, "white")
    wrong = Scene((Thing("ring", "red", "small", 32.0, 32.0),), None, "white")
    images = render([right, wrong]) / 2 + 0.5
    metric = OracleAccuracy()
    metric.update(images, images, [right.caption] * 2)
    assert metric.compute().tolist() == [1.0, 0.0]


def test_clip_score_is_that_of_open_clip_itself(tmp_path):
    torch.manual_seed(0)
    words = tokenizer()
    save_clip(clip(len(words)), words, tmp_path)
    batch = [scene for _, scene in zip(range(5), scenes(0, True), strict=False)]
    images = (render(batch) / 2 + 0.5).mul(255).round() / 255
    found = in_two_batches(ClipScore(str(tmp_path)), images, images)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    encode = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    pictures = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in images]
    assert encode(PROMPTS).tolist() == words(PROMPTS, padding="max_length").input_ids
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        text = model.encode_text(encode(PROMPTS), normalize=True)
    assert torch.allclose(found, 100 * (image * text).sum(1).clamp(min=0), atol=1e-3)
