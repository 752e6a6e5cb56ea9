"""PSNR, SSIM, oracle accuracy and CLIP score agree with independent formulas, in batches."""

import math
from itertools import islice

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fp4dit.metrics.clip import CLIPScore
from fp4dit.metrics.full_reference import PSNR, SSIM
from fp4dit.pretraining import save_clip
from fp4dit.pretraining.architecture import build_clip, build_tokenizer
from fp4dit.worlds import Scene, ShapesWorld
from fp4dit.worlds.metric import OracleAccuracy
from fp4dit.worlds.shapes import ShapeThing

WORLD = ShapesWorld()
SCENES = list(islice(WORLD.iterate_scenes(0, True), 5))
PROMPTS = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def image_pairs():
    random = torch.Generator().manual_seed(0)
    reference = torch.nn.functional.interpolate(
        torch.rand(5, 3, 16, 16, generator=random), scale_factor=4, mode="bilinear"
    )
    return (reference + 0.1 * torch.randn(reference.shape, generator=random)).clamp(0, 1), reference


def score_in_two_batches(metric, images, reference):
    metric.update(images[:2], reference[:2], PROMPTS[:2])
    metric.update(images[2:], reference[2:], PROMPTS[2:])
    return metric.compute()


def test_psnr_is_its_formula_per_image(image_pairs):
    images, reference = image_pairs
    error = (images - reference).square().mean((1, 2, 3))
    assert torch.allclose(
        score_in_two_batches(PSNR(), *image_pairs), -10 * torch.log10(error), atol=1e-4
    )


def test_psnr_of_equal_images_is_infinite(image_pairs):
    assert score_in_two_batches(PSNR(), image_pairs[1], image_pairs[1]).tolist() == [math.inf] * 5


def compute_ssim(a, b):
    """Return SSIM (Wang et al., 2004) of one channel. truncate=3.5 gives the same 11 taps."""

    def blur(x):
        return gaussian_filter(x, 1.5, truncate=3.5, mode="mirror")

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return (
        (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    ).mean()


def test_ssim_is_its_formula_per_image(image_pairs):
    images, reference = (x.double().numpy() for x in image_pairs)
    expected = []
    for image, other in zip(images, reference, strict=True):
        expected.append(np.mean(list(map(compute_ssim, image, other))))
    assert score_in_two_batches(SSIM(), *image_pairs).tolist() == pytest.approx(expected, abs=2e-4)


def test_psnr_and_ssim_are_those_of_scikit_image(image_pairs):
    """Pad with grey, because scikit-image treats an image's border differently."""
    framed = [torch.nn.functional.pad(side, [10] * 4, value=0.5) for side in image_pairs]
    images, reference = (side.permute(0, 2, 3, 1).double().numpy() for side in framed)
    wang = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "channel_axis": 2,
        "full": True,
    }
    psnr, ssim = [], []
    for pair in zip(reference, images, strict=True):
        psnr.append(peak_signal_noise_ratio(*pair, data_range=1))
        ssim.append(structural_similarity(*pair, data_range=1, **wang)[1].mean())
    assert score_in_two_batches(PSNR(), *framed).tolist() == pytest.approx(psnr, abs=1e-4)
    assert score_in_two_batches(SSIM(), *framed).tolist() == pytest.approx(ssim, abs=1e-4)


def test_oracle_accuracy_is_one_for_correct_images_only():
    right = Scene((ShapeThing("circle", "red", "small", 32.0, 32.0),), None, "white")
    wrong = Scene((ShapeThing("ring", "red", "small", 32.0, 32.0),), None, "white")
    images = WORLD.render_scenes([right, wrong]) / 2 + 0.5
    metric = OracleAccuracy(WORLD)
    metric.update(images, images, [right.caption] * 2)
    assert metric.compute().tolist() == [1.0, 0.0]


def test_clip_score_is_that_of_open_clip_itself(tmp_path):
    torch.manual_seed(0)
    words = build_tokenizer(WORLD)
    save_clip(WORLD, build_clip(WORLD, len(words)), words, tmp_path)
    images = (WORLD.render_scenes(SCENES) / 2 + 0.5).mul(255).round() / 255
    scores = score_in_two_batches(CLIPScore(str(tmp_path)), images, images)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    encode = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    prepared = torch.stack([preprocess(Image.fromarray(picture)) for picture in pixels])
    assert encode(PROMPTS).tolist() == words(PROMPTS, padding="max_length").input_ids
    with torch.no_grad():
        image = model.encode_image(prepared, normalize=True)
        text = model.encode_text(encode(PROMPTS), normalize=True)
    assert torch.allclose(scores, 100 * (image * text).sum(1).clamp(min=0), atol=1e-3)
