"""Numbers of whole sets, against torch-fidelity's own on the same features, and closed forms."""

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

from fp4dit.errors import UserError
from fp4dit.metrics.fid import Fid, Sfid, frechet
from fp4dit.metrics.inception import Inception, by_pillow
from fp4dit.metrics.inception_score import InceptionScore
from fp4dit.metrics.kid import Cmmd, Kid
from fp4dit.metrics.perset import SetMetric
from fp4dit.metrics.precision_recall import Precision, Recall
from fp4dit.metrics.reference import RealSet, collect
from fp4dit.tasks.score import wanted
from tests.conftest import ROOT, Run

NETWORK = Inception("none.pth")
COMPARING = (Fid, Sfid, Kid, Cmmd, Precision, Recall)


def sample(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


X, Y = sample(60, 12, 1, 0.3), sample(50, 12, 2)
FEW = sample(20, 40, 3), sample(20, 40, 4)  # fewer images than features


@pytest.mark.parametrize(("x", "y"), [(X, Y), FEW, (X, Y[:8])], ids=["many", "few", "few of one"])
def test_frechet_distance_is_torch_fidelitys(x: torch.Tensor, y: torch.Tensor):
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(z) for z in (x, y)), verbose=False)
    assert frechet(x, y) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-5)


def test_frechet_distance_of_a_shifted_set_is_the_shift_squared():
    assert frechet(X + 0.5, X) == pytest.approx(0.25 * 12)
    assert frechet(FEW[0] + 0.5, FEW[0]) == pytest.approx(0.25 * 40)


def test_frechet_distance_of_a_stretched_set_is_that_of_gaussians():
    """tr(A + B - 2 (AB)^(1/2)) of A = 4 B is tr B."""
    y = Y - Y.mean(0)
    assert frechet(2 * y, y) == pytest.approx(torch.cov(y.T).trace().item())


def test_kernel_distance_is_torch_fidelitys_of_a_single_subset():
    y = sample(60, 12, 2)
    theirs = kid_features_to_metric(X, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert Kid(NETWORK).value(X, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_inception_score_is_torch_fidelitys():
    theirs = isc_features_to_metric(X, splits=7, shuffle=False, rng_seed=0)
    assert InceptionScore(NETWORK, splits=7).value(X, Y) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys():
    theirs = prc_features_to_metric(X, Y, prc_neighborhood=3, prc_batch_size=10, save_cpu_ram=False, verbose=False)
    assert Precision(NETWORK).value(X, Y) == pytest.approx(theirs["precision"])
    assert Recall(NETWORK).value(X, Y) == pytest.approx(theirs["recall"])
    assert 0 < theirs["precision"] < 1


def test_distance_in_clips_space_is_its_double_sum():
    x, y = X[:5].numpy(), Y[:4].numpy()
    kernel = lambda a, b: np.mean([[np.exp(-np.square(p - q).sum() / 200) for q in b] for p in a])
    assert Cmmd(NETWORK).value(X[:5], Y[:4]) == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


@pytest.mark.parametrize(("kind", "equal"), zip(COMPARING, (0, 0, None, 0, 1, 1), strict=True))
def test_equal_sets_and_their_order(kind: type[SetMetric], equal: float | None):
    metric, shuffled = kind(NETWORK), X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))]
    assert metric.value(shuffled, Y) == pytest.approx(metric.value(X, Y), abs=1e-9)
    found = metric.value(X, shuffled)
    assert found <= 0 if equal is None else found == pytest.approx(equal, abs=1e-6)  # KID's estimate is unbiased


@pytest.mark.parametrize("kind", COMPARING)
def test_in_batches_as_at_once(kind: type[SetMetric]):
    metric = kind(NETWORK)
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(X[:50][part], Y[part])
    assert metric.compute().item() == pytest.approx(kind(NETWORK).value(X[:50], Y))


@pytest.mark.parametrize("kind", COMPARING)
@pytest.mark.parametrize("real", [False, True])
def test_what_is_drawn_again_is_the_number_of_the_images_drawn(kind: type[SetMetric], real: bool):
    metric, index = kind(NETWORK, "a file" if real else None), torch.arange(0, 100, 2) % 50
    assert metric.compares != real
    drawn = metric.drawn(X[:50], Y)(index)
    assert drawn == pytest.approx(metric.value(X[index], Y if real else Y[index]), abs=1e-9)


def test_the_interval_is_around_the_number_and_narrows_with_the_images():
    widths = []
    for n in (50, 800):
        x, y = sample(n, 4, 5, 0.4), sample(n, 4, 6)
        found = Fid(NETWORK).report({"pool": x}, {"pool": y})
        assert found.low < found.mean < found.high
        assert found.mean == pytest.approx(frechet(x, y))
        widths.append(found.high - found.low)
    assert 3 < widths[0] / widths[1] < 6  # the root of 16 is 4
    assert Fid(NETWORK).report({"pool": x}, {"pool": y}) == found


def test_the_name_says_reference_counts_and_filter(tmp_path: Path):
    assert Fid(NETWORK).label("fid", 64) == "fid/full_precision-64/tf1-bilinear"
    assert Kid(Inception("", "pil-bicubic")).label("kid", 8) == "kid/full_precision-8/pil-bicubic"
    assert InceptionScore(NETWORK).label("inception_score", 64) == "inception_score/64/tf1-bilinear"
    assert "arXiv:1706.08500" in Fid(NETWORK).about


def test_too_few_images_are_refused():
    for metric, least in ((Fid(NETWORK), 2), (Precision(NETWORK), 4), (InceptionScore(NETWORK), 10)):
        few = {metric.layer: X[: least - 1]}
        with pytest.raises(UserError, match=f"needs at least {least} images, and there are {least - 1}"):
            metric.report(few, few)


def test_an_unknown_filter_is_refused():
    with pytest.raises(UserError, match="resize=nearest: images are resized by tf1-bilinear or pil-bicubic"):
        Inception("", "nearest")


def test_metrics_share_an_extractor():
    same = [Fid(NETWORK), Kid(Inception("none.pth")), Sfid(NETWORK), InceptionScore(NETWORK)]
    assert wanted(same) == {NETWORK: (["pool", "spatial", "logits"], True)}
    assert wanted([InceptionScore(NETWORK)]) == {NETWORK: (["logits"], False)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's network with weights at random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: None)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> torch.nn.Module:
    return Inception(str(weights)).load()


def images(n: int = 3, size: int = 40) -> torch.Tensor:
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def test_features_are_torch_fidelitys(weights: Path, network: torch.nn.Module):
    found = network(images())
    theirs = FeatureExtractorInceptionV3("same", ["2048", "logits_unbiased"], str(weights))
    pool, logits = theirs((255 * images()).round().byte())
    assert torch.equal(found["pool"], pool)
    assert torch.equal(found["logits"], logits)
    assert found["spatial"].shape == (3, 7 * 17 * 17)
    assert found["spatial"].min() == 0  # behind the activation


def test_pillow_resizes_each_channel_as_a_picture_of_its_own():
    found = by_pillow(images(1, 40))
    picture = Image.fromarray((255 * images(1, 40))[0].round().byte().permute(1, 2, 0).numpy())
    theirs = np.asarray(picture.resize((299, 299), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(found[0].numpy().astype(int) - theirs).max() <= 1


def test_another_models_checkpoint_is_refused(tmp_path: Path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is no checkpoint of torch-fidelity's Inception"):
        Inception(str(tmp_path / "other.pth")).load()
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        Inception(str(tmp_path / "broken.pth")).load()


@pytest.fixture
def real(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    for i, size in enumerate((30, 40)):
        pixels = (255 * images(2, size)[i]).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_real_images_are_kept_as_features_and_compared_with(
    run: Run, weights: Path, network: torch.nn.Module, real: Path, tmp_path: Path
):
    import pipelines.features

    out = tmp_path / "real.safetensors"
    given = [f"images={real}", f"out={out}", "metrics=fid", f"metrics.fid.extractor.path={weights}"]
    assert run(*given, main=pipelines.features.main, outputs=False) == 0
    expected = network(images(2, 40)[1:])["pool"]
    torch.testing.assert_close(load_file(out)["pool"][1:], expected)
    metric = Fid(Inception(str(weights)), str(out))
    assert not metric.compares
    assert metric.label("fid", 64) == "fid/real-2/64/tf1-bilinear"
    found = metric.report({"pool": load_file(out)["pool"]}, None)
    assert found.mean == pytest.approx(0, abs=1e-4)
    with pytest.raises(UserError, match=r"holds features of inception-tf1-bilinear .* inception-pil-bicubic"):
        RealSet(str(out)).features(Inception(str(weights), "pil-bicubic"))


def test_what_is_no_set_of_images_is_refused(run: Run, weights: Path, real: Path, tmp_path: Path, capsys):
    import pipelines.features

    (real / "2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2\.png is no image"):
        collect(real, "real", Inception(str(weights)), "cpu", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(
        f"images={tmp_path}/none",
        "out=out",
        f"metrics.fid.extractor.path={weights}",
        main=pipelines.features.main,
        outputs=False,
    )
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds no features: python -m pipelines\.features makes such a file"):
        RealSet(str(ROOT / "README.md")).known  # noqa: B018
