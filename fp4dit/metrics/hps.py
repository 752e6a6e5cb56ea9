"""Human Preference Score v2.0 and v2.1 (arXiv:2306.09341), without the package hpsv2."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import open_clip
from accelerate import init_empty_weights
from jaxtyping import Float
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize
from torchvision.transforms.functional import pad, resize

from fp4dit.errors import UserError
from fp4dit.metrics.base import Images, PerImage
from fp4dit.metrics.checkpoint import fill, tensors
from fp4dit.metrics.towers import Towers, backbone
from fp4dit.weights import need

VIT_H_14: Mapping[str, Any] = open_clip.get_model_config("ViT-H-14") or {}


class Hps(PerImage):
    """100 cos, as in the paper's tables and as `hpsv2.evaluate` prints it; `hpsv2.score` answers with cos itself.

    `path` is a checkpoint of hpsv2's, as `fp4dit.weights` finds it; `architecture` is in open_clip's form.
    """

    higher_is_better = True

    def __init__(self, path: str, version: str, architecture: Mapping[str, Any] = VIT_H_14) -> None:
        super().__init__()
        self.towers = load(path, architecture)
        source = f"{path} in open_clip {open_clip.__version__}: {backbone(architecture)}"
        self.about = (
            f"HPS v{version}, 100 cos, of {source}; longest side to its size, antialiased bicubic, padded with black"
        )

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return 100 * self.towers.agreement(images, prompts)

    def note(self, prompts: Sequence[str]) -> str:
        return self.towers.note(prompts)


def load(path: str, architecture: Mapping[str, Any]) -> Towers:
    """Weights are held once: none are drawn for the checkpoint's to replace."""
    found = tensors(need(path))
    if not isinstance(found, Mapping) or not isinstance(found.get("state_dict"), Mapping):
        raise UserError(f"{path} is no checkpoint of hpsv2: it has no state_dict")
    with init_empty_weights(include_buffers=False):
        model = open_clip.CLIP(**architecture)
    fill(model, found["state_dict"], path)
    size, length = architecture["vision_cfg"]["image_size"], architecture["text_cfg"]["context_length"]
    preprocess = Compose([partial(boxed, size=size), Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)])
    return Towers(model, preprocess, open_clip.SimpleTokenizer(), length)


def boxed(images: Images, size: int) -> Float[Tensor, "n 3 {size} {size}"]:
    """The longest side resized to `size`, the other one padded with black, a smaller half first.

    As hpsv2 does with the torchvision of here; before 0.17 that did not antialias tensors, which hpsv2 leaves to it.
    """
    scale = size / max(images.shape[2:])
    height, width = (round(side * scale) for side in images.shape[2:])
    top, left = (size - height) // 2, (size - width) // 2
    images = resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return pad(images, [left, top, size - width - left, size - height - top])
