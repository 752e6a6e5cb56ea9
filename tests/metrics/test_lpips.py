"""LPIPS agrees with its definition in the paper on random AlexNets and VGGs."""

from pathlib import Path

import pytest
import torch
import torchmetrics
import torchvision
from torch.nn import functional as F

from fp4dit.metrics.full_reference import LPIPS
from fp4dit.utils.errors import UserError
from tests.helpers.tiny_clip import draw_pictures

HEADS = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
# The layers of `features` whose output is compared.
COMPARED_LAYERS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


def make_network(name: str) -> torch.nn.Module:
    """Return the convolutions of torchvision's network with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[name](
            weights=None
        )
    model.classifier = torch.nn.Sequential()
    model.to_empty(device="cpu")
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.05)
    return model.eval()


def compute_lpips(
    name: str, model: torch.nn.Module, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Return equation 1 of Zhang et al., 2018.

    It sums distances of unit-length features, weighted by channel and averaged over space.
    """
    heads = torch.load(HEADS / f"{name}.pth", "cpu", weights_only=True)
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((2 * side - 1 - mean[:, None, None]) / std[:, None, None] for side in (a, b))
    total = torch.zeros(len(a))
    for i, layer in enumerate(model.features):
        x, y = layer(x), layer(y)
        if i in COMPARED_LAYERS[name]:
            weight = heads[f"lin{COMPARED_LAYERS[name].index(i)}.model.1.weight"]
            total += ((F.normalize(x) - F.normalize(y)).square() * weight).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_values_are_the_definition_and_equal_images_are_at_zero(tmp_path: Path, name: str):
    model = make_network(name)
    path = tmp_path / f"{name}.pth"
    torch.save({**model.state_dict(), "classifier.6.bias": torch.zeros(1000)}, path)
    metric = LPIPS(str(path), name)
    images, _ = draw_pictures(3, 64, 72)
    noisy = (images + 0.1 * torch.randn(images.shape)).clamp(0, 1)
    with torch.no_grad():
        expected = compute_lpips(name, model, noisy, images)
    torch.testing.assert_close(metric.score(noisy, images, []), expected, atol=1e-5, rtol=1e-4)
    assert metric.score(images, images, []).tolist() == [0, 0, 0]
    assert (expected > 1e-4).all()
    assert metric.compares_to_reference


def test_one_image_has_one_value(tmp_path: Path):
    torch.save(make_network("alex").state_dict(), tmp_path / "alex.pth")
    assert LPIPS(str(tmp_path / "alex.pth")).score(*[torch.rand(1, 3, 64, 64)] * 2, []).shape == (
        1,
    )


def test_weights_of_another_network_are_refused(tmp_path: Path):
    torch.save(make_network("vgg").state_dict(), tmp_path / "vgg.pth")
    with pytest.raises(
        UserError, match=r"vgg\.pth is not a checkpoint of Alexnet: it lacks slice2\.3\.weight"
    ):
        LPIPS(str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="no network 'alexnet': there are alex, vgg"):
        LPIPS(str(tmp_path / "vgg.pth"), "alexnet")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_a_broken_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=f"{name} cannot be read as a checkpoint"):
        LPIPS(str(tmp_path / name))
