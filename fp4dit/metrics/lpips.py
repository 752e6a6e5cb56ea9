"""LPIPS: how far an image is from the full-precision one, in features of a network (arXiv:1801.03924)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from fp4dit.errors import UserError
from fp4dit.metrics.base import Images, PerImage
from fp4dit.metrics.checkpoint import fill, tensors
from fp4dit.weights import need

NETWORKS = {"alex": "AlexNet", "vgg": "VGG16"}


class Lpips(PerImage):
    """0 for equal images, and at their own size. `path` is torchvision's checkpoint of the network, as `fp4dit.weights`
    finds it; the linear heads, version 0.1, are torchmetrics' own."""

    higher_is_better = False
    compares = True

    def __init__(self, path: str, network: str = "alex") -> None:
        super().__init__()
        if network not in NETWORKS:
            raise UserError(f"LPIPS has no network {network!r}: there are {', '.join(NETWORKS)}")
        self.model = _LPIPS(net=network, pnet_rand=True)  # pyright: ignore[reportArgumentType]
        fill(self.model.net, renamed(tensors(need(path)), list(self.model.net.state_dict())), path)
        self.about = f"LPIPS v0.1 to the full-precision image, by {NETWORKS[network]} ({path}), images in [-1, 1]"

    @torch.no_grad()
    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return self.model(2 * images - 1, 2 * reference - 1).flatten()


def renamed(found: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """torchvision's `features.3.bias` is `slice2.3.bias` here; its classifier is not used."""
    known = {f"features.{name.partition('.')[2]}": name for name in names}
    return {known.get(name, name): value for name, value in found.items() if not name.startswith("classifier.")}
