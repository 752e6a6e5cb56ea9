"""Set metrics agree with torch-fidelity on the same features, and with closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from fp4dit.evaluation.score import LayersToRead, collect_layers
from fp4dit.metrics.inception import InceptionFeatures, resize_with_pillow
from fp4dit.metrics.inception_metrics import FID, InceptionScore, SpatialFID, frechet_distance
from fp4dit.metrics.pairwise import CMMD, KID, Precision, Recall
from fp4dit.metrics.real_features import RealFeatures, collect_features
from fp4dit.metrics.set_metric import FeatureSetMetric
from fp4dit.utils.errors import UserError
from tests.conftest import ROOT, Run

NETWORK = InceptionFeatures("none.pth")
COMPARING = (FID, SpatialFID, KID, CMMD, Precision, Recall)


def draw_features(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        + shift
    )


X, Y = draw_features(60, 12, 1, 0.3), draw_features(50, 12, 2)
FEW = draw_features(20, 40, 3), draw_features(20, 40, 4)  # fewer images than features


@pytest.mark.parametrize(("x", "y"), [(X, Y), FEW, (X, Y[:8])], ids=["many", "few", "few of one"])
def test_frechet_distance_is_torch_fidelitys(x: torch.Tensor, y: torch.Tensor):
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(z) for z in (x, y)), verbose=False
    )
    assert frechet_distance(x, y) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-5)


def test_frechet_distance_of_a_shifted_set_is_the_shift_squared():
    assert frechet_distance(X + 0.5, X) == pytest.approx(0.25 * 12)
    assert frechet_distance(FEW[0] + 0.5, FEW[0]) == pytest.approx(0.25 * 40)


def test_frechet_distance_of_a_stretched_set():
    """Check that tr(A + B - 2 (A B)^(1/2)) is tr B for A = 4 B."""
    y = Y - Y.mean(0)
    assert frechet_distance(2 * y, y) == pytest.approx(torch.cov(y.T).trace().item())


def test_kernel_distance_is_torch_fidelitys_of_a_single_subset():
    y = draw_features(60, 12, 2)
    theirs = kid_features_to_metric(X, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert KID(NETWORK).compute_value(X, y) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-9
    )


def test_inception_score_is_torch_fidelitys():
    theirs = isc_features_to_metric(X, splits=7, shuffle=False, rng_seed=0)
    assert InceptionScore(NETWORK, splits=7).compute_value(X, Y) == pytest.approx(
        theirs["inception_score_mean"], rel=1e-9
    )


def test_precision_and_recall_are_torch_fidelitys():
    theirs = prc_features_to_metric(
        X, Y, prc_neighborhood=3, prc_batch_size=10, save_cpu_ram=False, verbose=False
    )
    assert Precision(NETWORK).compute_value(X, Y) == pytest.approx(theirs["precision"])
    assert Recall(NETWORK).compute_value(X, Y) == pytest.approx(theirs["recall"])
    assert 0 < theirs["precision"] < 1


def test_distance_in_clips_space_is_its_double_sum():
    x, y = X[:5].numpy(), Y[:4].numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        distances = np.square(a[:, None] - b[None]).sum(2)
        return np.exp(-distances / 200).mean()

    assert CMMD(NETWORK).compute_value(X[:5], Y[:4]) == pytest.approx(
        1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    )


@pytest.mark.parametrize(("kind", "equal"), zip(COMPARING, (0, 0, None, 0, 1, 1), strict=True))
def test_equal_sets_and_their_order(kind: type[FeatureSetMetric], equal: float | None):
    metric = kind(NETWORK)
    shuffled = X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))]
    assert metric.compute_value(shuffled, Y) == pytest.approx(metric.compute_value(X, Y), abs=1e-9)
    value = metric.compute_value(X, shuffled)
    if equal is None:  # KID's estimate is unbiased, and so is negative for equal sets
        assert value <= 0
    else:
        assert value == pytest.approx(equal, abs=1e-6)


@pytest.mark.parametrize("kind", COMPARING)
def test_in_batches_as_at_once(kind: type[FeatureSetMetric]):
    metric = kind(NETWORK)
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(X[:50][part], Y[part])
    assert metric.compute().item() == pytest.approx(kind(NETWORK).compute_value(X[:50], Y))


@pytest.mark.parametrize("kind", COMPARING)
@pytest.mark.parametrize("with_file", [False, True])
def test_a_resample_is_the_value_of_the_images_drawn(kind: type[FeatureSetMetric], with_file: bool):
    metric, index = kind(NETWORK, "a file" if with_file else None), torch.arange(0, 100, 2) % 50
    assert metric.compares_to_reference != with_file
    drawn = metric.make_resampler(X[:50], Y)(index)
    assert drawn == pytest.approx(
        metric.compute_value(X[index], Y if with_file else Y[index]), abs=1e-9
    )


def test_interval_contains_the_value_and_narrows():
    widths = []
    for n in (50, 800):
        x, y = draw_features(n, 4, 5, 0.4), draw_features(n, 4, 6)
        interval = FID(NETWORK).estimate({"pool": x}, {"pool": y})
        assert interval.low < interval.mean < interval.high
        assert interval.mean == pytest.approx(frechet_distance(x, y))
        widths.append(interval.high - interval.low)
    assert 3 < widths[0] / widths[1] < 6  # the root of 16 is 4
    assert FID(NETWORK).estimate({"pool": x}, {"pool": y}) == interval


def test_the_name_says_reference_counts_and_filter(tmp_path: Path):
    assert FID(NETWORK).stored_name("fid", 64) == "fid/full_precision-64/tf1-bilinear"
    assert (
        KID(InceptionFeatures("", "pil-bicubic")).stored_name("kid", 8)
        == "kid/full_precision-8/pil-bicubic"
    )
    assert (
        InceptionScore(NETWORK).stored_name("inception_score", 64)
        == "inception_score/64/tf1-bilinear"
    )
    assert "arXiv:1706.08500" in FID(NETWORK).about


def test_too_few_images_are_refused():
    for metric, least in (
        (FID(NETWORK), 2),
        (Precision(NETWORK), 4),
        (InceptionScore(NETWORK), 10),
    ):
        few = {metric.layer: X[: least - 1]}
        with pytest.raises(
            UserError, match=f"needs at least {least} images, and there are {least - 1}"
        ):
            metric.estimate(few, few)


def test_an_unknown_filter_is_refused():
    with pytest.raises(
        UserError, match="resize=nearest: images are resized by tf1-bilinear or pil-bicubic"
    ):
        InceptionFeatures("", "nearest")


def test_metrics_share_an_extractor():
    equal = InceptionFeatures("none.pth")
    metrics = [FID(NETWORK), KID(equal), SpatialFID(NETWORK), InceptionScore(NETWORK)]
    layers = ["pool", "spatial", "logits"]
    assert collect_layers(metrics) == {NETWORK: LayersToRead(layers, of_reference=True)}
    assert collect_layers(metrics[-1:]) == {NETWORK: LayersToRead(["logits"])}


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save torch-fidelity's network with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *_, **__: None,
        )
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception_network(inception_weights: Path) -> torch.nn.Module:
    return InceptionFeatures(str(inception_weights)).load()


def make_images(n: int = 3, size: int = 40) -> torch.Tensor:
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def test_features_are_torch_fidelitys(inception_weights: Path, inception_network: torch.nn.Module):
    features = inception_network(make_images())
    theirs = FeatureExtractorInceptionV3(
        "same", ["2048", "logits_unbiased"], str(inception_weights)
    )
    pool, logits = theirs((255 * make_images()).round().byte())
    assert torch.equal(features["pool"], pool)
    assert torch.equal(features["logits"], logits)
    assert features["spatial"].shape == (3, 7 * 17 * 17)
    assert features["spatial"].min() == 0  # behind the activation


def test_pillow_resizes_each_channel_as_a_picture_of_its_own():
    resized = resize_with_pillow(make_images(1, 40))
    picture = Image.fromarray((255 * make_images(1, 40))[0].round().byte().permute(1, 2, 0).numpy())
    theirs = np.asarray(picture.resize((299, 299), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(resized[0].numpy().astype(int) - theirs).max() <= 1


def test_another_models_checkpoint_is_refused(tmp_path: Path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"other\.pth is not a checkpoint of torch-fidelity's Inception"
    ):
        InceptionFeatures(str(tmp_path / "other.pth")).load()
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        InceptionFeatures(str(tmp_path / "broken.pth")).load()


@pytest.fixture
def real_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    for i, size in enumerate((30, 40)):
        pixels = (255 * make_images(2, size)[i]).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_features_of_real_images_are_stored_and_compared(
    run: Run,
    inception_weights: Path,
    inception_network: torch.nn.Module,
    real_folder: Path,
    tmp_path: Path,
):
    import pipelines.features

    out = tmp_path / "real.safetensors"
    arguments = [
        f"images={real_folder}",
        f"out={out}",
        "metrics=fid",
        f"metrics.fid.extractor.path={inception_weights}",
    ]
    assert run(*arguments, main=pipelines.features.main, outputs=False) == 0
    expected = inception_network(make_images(2, 40)[1:])["pool"]
    torch.testing.assert_close(load_file(out)["pool"][1:], expected)
    metric = FID(InceptionFeatures(str(inception_weights)), str(out))
    assert not metric.compares_to_reference
    assert metric.stored_name("fid", 64) == "fid/real-2/64/tf1-bilinear"
    interval = metric.estimate({"pool": load_file(out)["pool"]}, None)
    assert interval.mean == pytest.approx(0, abs=1e-4)
    with pytest.raises(
        UserError, match=r"holds features of inception-tf1-bilinear .* inception-pil-bicubic"
    ):
        RealFeatures(str(out)).load_features(
            InceptionFeatures(str(inception_weights), "pil-bicubic")
        )


def test_folders_and_files_without_images_are_refused(
    run: Run, inception_weights: Path, real_folder: Path, tmp_path: Path, capsys
):
    import pipelines.features

    (real_folder / "2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2\.png is no image"):
        collect_features(
            real_folder, "real", InceptionFeatures(str(inception_weights)), "cpu", tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    assert run(
        f"images={tmp_path}/none",
        "out=out",
        f"metrics.fid.extractor.path={inception_weights}",
        main=pipelines.features.main,
        outputs=False,
    )
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"holds no features: python -m pipelines\.features makes such a file"
    ):
        RealFeatures(str(ROOT / "README.md")).info  # noqa: B018
