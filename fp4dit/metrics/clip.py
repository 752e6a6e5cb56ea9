"""CLIP score: how well an image and its prompt agree, in the eyes of any open_clip model."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from fp4dit.metrics.base import Images, PerImage
from fp4dit.weights import need


class ClipScore(PerImage):
    """100 max(cos, 0), as torchmetrics defines it (arXiv:2104.08718 up to its factor).

    `path` is a folder in open_clip's layout, as `fp4dit.weights` finds it.
    """

    higher_is_better = True

    def __init__(self, path: str) -> None:
        super().__init__()
        name = f"local-dir:{need(path)}"
        model = open_clip.create_model(name, require_pretrained=True)
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.preprocess = preprocessing(self.model)
        self.about = f"CLIP score of {path} in open_clip {open_clip.__version__}"

    @torch.no_grad()
    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        text = self.tokenizer(list(prompts)).to(images.device)
        pair = self.model.encode_image(self.preprocess(images)), self.model.encode_text(text)
        return 100 * F.cosine_similarity(*pair).clamp(min=0)


def preprocessing(model: nn.Module) -> Compose:
    """open_clip's own for inference, on tensors in [0, 1] instead of PIL images: no loss by way of 8 bits."""
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"] if not isinstance(config["size"], int) else (config["size"],) * 2
    mode = InterpolationMode(config.get("interpolation", "bicubic"))
    squash = config.get("resize_mode", "shortest") == "squash"
    resize = Resize(list(size) if squash else min(size), mode, antialias=True)
    return Compose([resize, CenterCrop(list(size)), Normalize(config["mean"], config["std"])])
