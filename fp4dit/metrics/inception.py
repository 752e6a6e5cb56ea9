"""Inception-v3 as FID is defined by, with the weights that torch-fidelity converted from TensorFlow's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fp4dit.calls import removed
from fp4dit.errors import UserError
from fp4dit.metrics.base import Images
from fp4dit.metrics.checkpoint import tensors
from fp4dit.weights import need

SIZE = 299
Pixels = UInt8[Tensor, "n 3 _ _"]


def eight_bits(images: Images) -> Pixels:
    """As they were drawn. The network resizes them to its size as TensorFlow 1 does."""
    return (255 * images).round().to(torch.uint8)


def by_pillow(images: Images) -> Pixels:
    """Each channel in floating point, then to 8 bits, which the network reads; it finds nothing left to resize."""
    pixels = [Image.fromarray(np.asarray(channel)) for channel in eight_bits(images).flatten(0, 1).float().cpu()]
    resized = [np.asarray(channel.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for channel in pixels]
    found = torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2])
    return found.clamp(0, 255).round().to(images.device, torch.uint8)


FILTERS: dict[str, Callable[[Images], Pixels]] = {"tf1-bilinear": eight_bits, "pil-bicubic": by_pillow}


@dataclass(frozen=True)
class Inception:
    """`resize` is how images get to its 299 pixels: `tf1-bilinear` as in TensorFlow 1, by which FID was defined, or
    `pil-bicubic`, which does not alias (arXiv:2104.11222). `path` is torch-fidelity's checkpoint."""

    path: str
    resize: str = "tf1-bilinear"

    def __post_init__(self) -> None:
        if self.resize not in FILTERS:
            raise UserError(f"resize={self.resize}: images are resized by {' or '.join(FILTERS)}")

    @property
    def name(self) -> str:
        return f"inception-{self.resize}"

    def load(self) -> nn.Module:
        return Network(opened(self.path), FILTERS[self.resize])


class Network(nn.Module):
    """Answers with the layers `pool`, `logits` (without their bias, as torch-fidelity has them) and `spatial`."""

    def __init__(self, inception: FeatureExtractorInceptionV3, resize: Callable[[Images], Pixels]) -> None:
        super().__init__()
        self.inception, self.resize = inception, resize

    @torch.no_grad()
    def forward(self, images: Images) -> dict[str, Float[Tensor, "n d"]]:
        found: list[Tensor] = []
        note: Any = lambda _m, _given, out: found.append(out)
        with removed([self.inception.Mixed_6d.branch1x1.register_forward_hook(note)]):
            pool, logits = self.inception(self.resize(images))
        spatial = found[0][:, :7].flatten(1).float()  # of what TensorFlow calls mixed_6/conv
        return {"pool": pool, "logits": logits, "spatial": spatial}


def opened(path: str) -> FeatureExtractorInceptionV3:
    """Raises UserError if it is another model's checkpoint, or none."""
    place = need(path)
    tensors(place)  # which lets nothing but tensors in, while the network's own way to read a file would run it
    try:
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(place))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no checkpoint of torch-fidelity's Inception: {str(error)[:300]}") from error
