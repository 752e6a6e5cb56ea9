"""Metrics that compare an image with the full-precision image of its seed: PSNR, SSIM, LPIPS."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.functional.image.lpips import _LPIPS

from fp4dit.metrics.base import Images, PerImageMetric
from fp4dit.metrics.loading import load_into, load_tensors
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import require_weights


class PSNR(PerImageMetric):
    """Peak signal-to-noise ratio, 10 log10(1 / MSE) dB. It is infinite for equal images.

    Example:
        >>> PSNR().score(images, images + 0.1, prompts)
        tensor([20., 20.])
    """

    title, digits, higher_is_better = "PSNR, dB", 1, True
    compares_to_reference = True
    about = "Peak signal-to-noise ratio against the full-precision image of the same seed"

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        return peak_signal_noise_ratio(
            images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )


class SSIM(PerImageMetric):
    """Structural similarity (Wang et al., 2004) in [-1, 1], with a Gaussian window of 11 pixels.

    Borders are mirrored and count like the rest of the image.

    Example:
        >>> SSIM().score(images, images, prompts)
        tensor([1., 1.])
    """

    title, digits, higher_is_better = "SSIM", 3, True
    compares_to_reference = True
    about = "Structural similarity (Wang et al., 2004) to the full-precision image of the same seed"

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        values = structural_similarity_index_measure(
            images, reference, data_range=1.0, reduction="none"
        )
        assert isinstance(values, Tensor)
        return torch.atleast_1d(values)


NETWORKS = {"alex": "AlexNet", "vgg": "VGG16"}


class LPIPS(PerImageMetric):
    """LPIPS v0.1 (arXiv:1801.03924), at the images' own size. It is 0 for equal images.

    Args:
        path: torchvision's checkpoint of the network, as `fp4dit.utils.hub` finds it. The linear
            heads are those of torchmetrics.
        network: `alex` or `vgg`.

    Raises:
        UserError: if there is no such network, or the checkpoint belongs to another one.

    Example:
        >>> LPIPS("/path/of/alexnet-owt-7be5be79.pth").score(images, images, prompts)
        tensor([0., 0.])
    """

    title, digits, higher_is_better = "LPIPS", 3, False
    compares_to_reference = True

    def __init__(self, path: str, network: str = "alex") -> None:
        super().__init__()
        if network not in NETWORKS:
            raise UserError(f"LPIPS has no network {network!r}: there are {', '.join(NETWORKS)}")
        self.model = _LPIPS(net=network, pnet_rand=True)  # pyright: ignore[reportArgumentType]
        names = list(self.model.net.state_dict())
        load_into(
            self.model.net, rename_lpips_weights(load_tensors(require_weights(path)), names), path
        )
        source = f"{NETWORKS[network]} ({path})"
        self.about = f"LPIPS v0.1 to the full-precision image, by {source}, images in [-1, 1]"

    @torch.no_grad()
    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        return self.model(2 * images - 1, 2 * reference - 1).flatten()


def rename_lpips_weights(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Give torchvision's weights the names of torchmetrics' network.

    torchvision's `features.3.bias` is `slice2.3.bias` there. The classifier is left out.
    """
    slice_names = {f"features.{name.partition('.')[2]}": name for name in names}
    renamed = {}
    for name, value in state.items():
        if not name.startswith("classifier."):
            renamed[slice_names.get(name, name)] = value
    return renamed
