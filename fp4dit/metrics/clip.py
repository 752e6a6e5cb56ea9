"""Metrics of CLIP models (arXiv:2103.00020): CLIP score, image similarity, and features.

The CLIP score (arXiv:2104.08718) compares an image with its prompt, `CLIPImageSimilarity` with the
full-precision image. Set metrics such as CMMD read `CLIPFeatures`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize

from fp4dit.metrics.base import Images, PerImageMetric
from fp4dit.metrics.clip_backbone import clamp_pixels, load_clip
from fp4dit.utils.hub import require_weights


class CLIPScore(PerImageMetric):
    """CLIP score: 100 max(cos(image, prompt), 0), as torchmetrics defines it.

    The paper's factor is 2.5 instead of 100.

    Args:
        path: Folder in open_clip's layout, as `fp4dit.utils.hub` finds it.
        quick_gelu: Use QuickGELU. OpenAI's weights were trained with it, even where their config
            does not say so.

    Example:
        >>> metric = CLIPScore("hf-hub:timm/vit_base_patch32_clip_224.openai", quick_gelu=True)
        >>> metric.score(images, images, ["a cat", "a dog"])
        tensor([27.1, 25.4])
    """

    title, higher_is_better = "CLIP", True

    def __init__(self, path: str, quick_gelu: bool = False) -> None:
        super().__init__()
        self.backbone, source = load_clip(path, quick_gelu)
        self.about = f"CLIP score, 100 max(cos, 0), of {source}"

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        return 100 * self.backbone.cosine_similarity(images, prompts).clamp(min=0)

    def describe_cut_prompts(self, prompts: Sequence[str]) -> str:
        return self.backbone.describe_cut_prompts(prompts)


class CLIPScoreB32(CLIPScore):
    """CLIP score of OpenAI's ViT-B/32, in a column of its own."""

    title, digits = "CLIP B/32", 2


class CLIPScoreL14(CLIPScore):
    """CLIP score of OpenAI's ViT-L/14, in a column of its own."""

    title, digits = "CLIP L/14", 2


class CLIPImageSimilarity(PerImageMetric):
    """Cosine of the CLIP embeddings of an image and of its full-precision image, in [-1, 1].

    Args:
        path: Folder in open_clip's layout, as `fp4dit.utils.hub` finds it.
        quick_gelu: Use QuickGELU, as for a `CLIPScore`.

    Example:
        >>> CLIPImageSimilarity("/path/of/a/clip").score(images, images, prompts)
        tensor([1., 1.])
    """

    title, digits, higher_is_better = "CLIP to full precision", 3, True
    compares_to_reference = True

    def __init__(self, path: str, quick_gelu: bool = False) -> None:
        super().__init__()
        self.backbone, source = load_clip(path, quick_gelu)
        self.about = f"Cosine to the full-precision image's embedding by {source}"

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        encode = self.backbone.encode_images
        return F.cosine_similarity(encode(images), encode(reference))


@dataclass(frozen=True)
class CLIPFeatures:
    """Feature extractor: the image encoder of a CLIP of OpenAI.

    Args:
        path: Folder in open_clip's layout. OpenAI's weights were trained with QuickGELU.

    Example:
        >>> CLIPFeatures("/path/of/a/clip").load()(images)["embedding"].shape  # 8 images
        torch.Size([8, 768])
    """

    path: str

    @property
    def name(self) -> str:
        return "clip-bicubic"

    def load(self) -> nn.Module:
        model: Any = open_clip.create_model(
            f"local-dir:{require_weights(self.path)}",
            force_quick_gelu=True,
            require_pretrained=True,
        )
        return CLIPFeatureNetwork(model.eval().requires_grad_(False))


class CLIPFeatureNetwork(nn.Module):
    """CLIP image encoder with one layer, `embedding`, of length 1.

    The whole image is resized to the model's square, whatever its aspect ratio.

    Args:
        model: CLIP of open_clip.

    Example:
        >>> network = CLIPFeatureNetwork(open_clip.create_model("ViT-B-32").eval())
        >>> network(torch.rand(2, 3, 64, 96))["embedding"].shape
        torch.Size([2, 512])
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"] if isinstance(config["size"], int) else config["size"][0]
        resize = Resize([size, size], InterpolationMode.BICUBIC, antialias=True)
        normalize = Normalize(config["mean"], config["std"])
        self.preprocess = Compose([resize, clamp_pixels, normalize])

    @torch.no_grad()
    def forward(self, images: Images) -> dict[str, Float[Tensor, "n d"]]:
        return {"embedding": F.normalize(self.model.encode_image(self.preprocess(images)).float())}
