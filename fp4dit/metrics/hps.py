"""Human Preference Score v2.0 and v2.1 (arXiv:2306.09341), without the package hpsv2."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import open_clip
from accelerate import init_empty_weights
from jaxtyping import Float
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize
from torchvision.transforms.functional import pad, resize

from fp4dit.metrics.base import Images, PerImageMetric
from fp4dit.metrics.clip_backbone import CLIPBackbone, describe_backbone
from fp4dit.metrics.loading import load_into, load_tensors
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import require_weights

VIT_H_14: Mapping[str, Any] = open_clip.get_model_config("ViT-H-14") or {}


class HPS(PerImageMetric):
    """Human Preference Score: 100 cos(image, prompt), as the paper's tables and `hpsv2.evaluate`.

    `hpsv2.score` returns the cosine itself. Each version is a subclass.

    Args:
        path: Checkpoint of hpsv2, as `fp4dit.utils.hub` finds it.
        architecture: Architecture of the model, in open_clip's form.

    Example:
        >>> HPSv21("/path/of/HPS_v2.1_compressed.pt").score(images, images, ["a cat", "a dog"])
        tensor([28.1, 26.9])
    """

    digits, higher_is_better = 2, True
    version: ClassVar[str]

    def __init__(self, path: str, architecture: Mapping[str, Any] = VIT_H_14) -> None:
        super().__init__()
        self.backbone = load_hps(path, architecture)
        source = f"{path} in open_clip {open_clip.__version__}: {describe_backbone(architecture)}"
        preprocessing = "longest side to its size, antialiased bicubic, padded with black"
        self.about = f"HPS v{self.version}, 100 cos, of {source}; {preprocessing}"

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        return 100 * self.backbone.cosine_similarity(images, prompts)

    def describe_cut_prompts(self, prompts: Sequence[str]) -> str:
        return self.backbone.describe_cut_prompts(prompts)


class HPSv20(HPS):
    """Human Preference Score of the weights v2.0."""

    title, version = "HPS v2.0", "2.0"


class HPSv21(HPS):
    """Human Preference Score of the weights v2.1."""

    title, version = "HPS v2.1", "2.1"


def load_hps(path: str, architecture: Mapping[str, Any]) -> CLIPBackbone:
    """Load a checkpoint of hpsv2. The weights are in memory once.

    Raises:
        UserError: if the file is not such a checkpoint.
    """
    checkpoint = load_tensors(require_weights(path))
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise UserError(f"{path} is not a checkpoint of hpsv2: it has no state_dict")
    with init_empty_weights(include_buffers=False):
        model = open_clip.CLIP(**architecture)
    load_into(model, checkpoint["state_dict"], path)
    size = architecture["vision_cfg"]["image_size"]
    max_tokens = architecture["text_cfg"]["context_length"]
    normalize = Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    preprocess = Compose([partial(resize_and_pad, size=size), normalize])
    return CLIPBackbone(model, preprocess, open_clip.SimpleTokenizer(), max_tokens)


def resize_and_pad(images: Images, size: int) -> Float[Tensor, "n 3 {size} {size}"]:
    """Resize the longest side to `size`, and pad the other one with black, the smaller half first.

    hpsv2 does the same with torchvision 0.17 or later. Earlier versions did not antialias tensors,
    and hpsv2 leaves that to torchvision.
    """
    scale = size / max(images.shape[2:])
    height, width = (round(side * scale) for side in images.shape[2:])
    top, left = (size - height) // 2, (size - width) // 2
    images = resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return pad(images, [left, top, size - width - left, size - height - top])
