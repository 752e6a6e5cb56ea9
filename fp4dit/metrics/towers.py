"""Images and prompts as vectors of one space: what metrics on CLIP's kind of model share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from fp4dit.errors import UserError
from fp4dit.metrics.base import Images
from fp4dit.weights import need

Tokenize = Callable[[list[str], int], Int[Tensor, "n length"]]  # cut and padded to a length, as open_clip's do
Vectors = Float[Tensor, "n d"]


class Towers(nn.Module):
    """A model with open_clip's `encode_image` and `encode_text`, and how to make what they read."""

    def __init__(
        self, model: nn.Module, preprocess: Callable[[Images], Images], tokenize: Tokenize, length: int
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocess, self.tokenize, self.length = preprocess, tokenize, length

    @torch.no_grad()
    def of_images(self, images: Images) -> Vectors:
        return self.model.encode_image(self.preprocess(images))

    @torch.no_grad()
    def of_prompts(self, prompts: Sequence[str]) -> Vectors:
        return self.model.encode_text(self.tokenize(list(prompts), self.length).to(self.model.logit_scale.device))

    def agreement(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """The cosine of each image and its prompt."""
        return F.cosine_similarity(self.of_images(images), self.of_prompts(prompts))

    def note(self, prompts: Sequence[str]) -> str:
        """How many prompts are not read to their end: those of which one more token of room changes what is read."""
        read, more = (self.tokenize(list(prompts), self.length + extra) for extra in (0, 1))
        count = int((more[:, : self.length] != read).any(1).sum())
        return f"{count} of {len(prompts)} prompts were cut at {self.length} tokens" if count else ""


def from_folder(path: str, quick_gelu: bool) -> tuple[Towers, str]:
    """Those of a folder in open_clip's layout, and what they are in words.

    Raises:
        UserError: if it is not such a folder, or its weights are broken or another model's.
    """
    name = f"local-dir:{need(path)}"
    try:
        model = open_clip.create_model(name, force_quick_gelu=quick_gelu, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a broken file makes open_clip raise almost anything
        raise UserError(f"{path} is no CLIP in open_clip's layout: {brief(error)}") from error
    config = open_clip.get_model_config(name) or {}
    image = preprocess_config(model)
    told = f"{backbone(config, quick_gelu)}; {image.resize_mode} side to its size, {image.interpolation}, centre crop"
    assert tokenizer.context_length
    return Towers(model, preprocessing(image), tokenizer, tokenizer.context_length), told


def brief(error: Exception) -> str:
    """On one line, without the names of all that is wrong in a large model."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def backbone(config: Mapping[str, Any], quick_gelu: bool = False) -> str:
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        return vision.timm_model_name
    kind = "ViT" if isinstance(vision.layers, int) else "ResNet"
    activation = "QuickGELU" if quick_gelu or config.get("quick_gelu") else "GELU"
    size = f"{vision.layers} layers, width {vision.width}, patch {vision.patch_size}"
    return f"{kind} ({size}, {vision.image_size} pixels, {activation})"


def preprocess_config(model: nn.Module) -> PreprocessCfg:
    return PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))


def preprocessing(config: PreprocessCfg) -> Compose:
    """open_clip's own for inference, on tensors in [0, 1] instead of PIL images: no loss by way of 8 bits."""
    size = [config.size] * 2 if isinstance(config.size, int) else list(config.size)
    if config.resize_mode == "longest":
        raise UserError("a CLIP that pads its images to a square (resize_mode: longest) cannot be used here")
    resize = Resize(
        size if config.resize_mode == "squash" else min(size), InterpolationMode(config.interpolation), antialias=True
    )
    return Compose([resize, clamped, CenterCrop(size), Normalize(config.mean, config.std)])


def clamped(images: Images) -> Images:
    """Bicubic interpolation overshoots, which 8 bits do not let through."""
    return images.clamp(0, 1)
