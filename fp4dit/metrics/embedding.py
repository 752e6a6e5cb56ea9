"""CLIP's embedding of an image as CMMD is defined by (arXiv:2401.09603)."""

from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize

from fp4dit.metrics.base import Images
from fp4dit.metrics.towers import clamped
from fp4dit.weights import need


@dataclass(frozen=True)
class Clip:
    """`path` is a folder in open_clip's layout, of OpenAI's weights, which were trained with QuickGELU."""

    path: str

    @property
    def name(self) -> str:
        return "clip-bicubic"

    def load(self) -> nn.Module:
        model: Any = open_clip.create_model(
            f"local-dir:{need(self.path)}", force_quick_gelu=True, require_pretrained=True
        )
        return Embedding(model.eval().requires_grad_(False))


class Embedding(nn.Module):
    """Answers with one layer, `embedding`, of length 1. The whole image is squashed to the model's square."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"] if isinstance(config["size"], int) else config["size"][0]
        resize = Resize([size, size], InterpolationMode.BICUBIC, antialias=True)
        self.preprocess = Compose([resize, clamped, Normalize(config["mean"], config["std"])])

    @torch.no_grad()
    def forward(self, images: Images) -> dict[str, Float[Tensor, "n d"]]:
        return {"embedding": F.normalize(self.model.encode_image(self.preprocess(images)).float())}
