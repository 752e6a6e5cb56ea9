"""Inception-v3, the network that defines FID.

torch-fidelity converted the weights from TensorFlow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fp4dit.metrics.base import Images
from fp4dit.metrics.loading import load_tensors
from fp4dit.utils.calls import remove_hooks
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import require_weights

SIZE = 299  # pixels of a side of the network's input
Pixels = UInt8[Tensor, "n 3 _ _"]


def to_uint8(images: Images) -> Pixels:
    """Round images to 8 bits. The network itself resizes them, as TensorFlow 1 does."""
    return (255 * images).round().to(torch.uint8)


def resize_with_pillow(images: Images) -> Pixels:
    """Resize images to the network's input size with Pillow's bicubic filter.

    Each channel is resized in floating point and then rounded to 8 bits. The network has nothing
    left to resize.
    """
    resized = []
    for channel in to_uint8(images).flatten(0, 1).float().cpu():
        picture = Image.fromarray(np.asarray(channel))
        resized.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    stacked = torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2])
    return stacked.clamp(0, 255).round().to(images.device, torch.uint8)


FILTERS: dict[str, Callable[[Images], Pixels]] = {
    "tf1-bilinear": to_uint8,
    "pil-bicubic": resize_with_pillow,
}


@dataclass(frozen=True)
class InceptionFeatures:
    """Feature extractor: Inception-v3 of 2015.

    Args:
        path: torch-fidelity's checkpoint, as `fp4dit.utils.hub` finds it.
        resize: Filter that resizes images to 299 pixels: `tf1-bilinear` as in TensorFlow 1, which
            FID was defined with, or `pil-bicubic`, which does not alias (arXiv:2104.11222).

    Raises:
        UserError: if `resize` is neither.

    Example:
        >>> extractor = InceptionFeatures("/path/of/weights-inception-2015-12-05.pth")
        >>> extractor.load()(images)["pool"].shape  # 8 images
        torch.Size([8, 2048])
    """

    path: str
    resize: str = "tf1-bilinear"

    def __post_init__(self) -> None:
        if self.resize not in FILTERS:
            raise UserError(f"resize={self.resize}: images are resized by {' or '.join(FILTERS)}")

    @property
    def name(self) -> str:
        return f"inception-{self.resize}"

    def load(self) -> nn.Module:
        return InceptionNetwork(load_inception(self.path), FILTERS[self.resize])


class InceptionNetwork(nn.Module):
    """Inception-v3 with the layers `pool`, `logits` and `spatial`.

    `logits` are without their bias, as in torch-fidelity. `spatial` are the first 7 channels of the
    layer that TensorFlow calls mixed_6/conv.

    Args:
        inception: Network of torch-fidelity.
        resize: Function from images in [0, 1] to the 8-bit values that the network reads.

    Example:
        >>> network = InceptionFeatures("/path/of/weights-inception-2015-12-05.pth").load()
        >>> {layer: output.shape[1] for layer, output in network(images).items()}
        {'pool': 2048, 'logits': 1008, 'spatial': 2023}
    """

    def __init__(
        self, inception: FeatureExtractorInceptionV3, resize: Callable[[Images], Pixels]
    ) -> None:
        super().__init__()
        self.inception, self.resize = inception, resize

    @torch.no_grad()
    def forward(self, images: Images) -> dict[str, Float[Tensor, "n d"]]:
        outputs: list[Tensor] = []

        def keep_output(_module: Any, _inputs: Any, output: Tensor) -> None:
            outputs.append(output)

        layer = self.inception.Mixed_6d.branch1x1
        with remove_hooks([layer.register_forward_hook(keep_output)]):
            pool, logits = self.inception(self.resize(images))
        spatial = outputs[0][:, :7].flatten(1).float()
        return {"pool": pool, "logits": logits, "spatial": spatial}


def load_inception(path: str) -> FeatureExtractorInceptionV3:
    """Load torch-fidelity's checkpoint.

    Raises:
        UserError: if the file is another model's checkpoint, or no checkpoint.
    """
    file = require_weights(path)
    # This refuses everything but tensors. The network's own way of reading a file would run code.
    load_tensors(file)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of torch-fidelity's Inception: {str(error)[:300]}"
        ) from error
