"""Image and text encoders of CLIP models, which several metrics share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from fp4dit.metrics.base import Images
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import require_weights

# Tokenizer with open_clip's interface: it cuts and pads the prompts to a number of tokens.
Tokenize = Callable[[list[str], int], Int[Tensor, "n length"]]

Vectors = Float[Tensor, "n d"]

MAX_ERROR_LENGTH = 300  # characters of another library's error message that are printed


class CLIPBackbone(nn.Module):
    """A model with open_clip's `encode_image` and `encode_text`, and the preparation of its inputs.

    Args:
        model: The model. It is put into evaluation mode.
        preprocess: Function from images in [0, 1] to the model's input.
        tokenize: Tokenizer with open_clip's interface.
        length: Number of tokens that the model reads of a prompt.

    Example:
        >>> backbone, _ = load_clip("hf-hub:timm/vit_base_patch32_clip_224.openai", True)
        >>> backbone.cosine_similarity(images, ["a cat", "a dog"])  # shape: [2]
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Images], Images],
        tokenize: Tokenize,
        length: int,
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocess, self.tokenize, self.length = preprocess, tokenize, length

    @torch.no_grad()
    def encode_images(self, images: Images) -> Vectors:
        """Return the embedding of each image."""
        return self.model.encode_image(self.preprocess(images))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Vectors:
        """Return the embedding of each prompt."""
        tokens = self.tokenize(list(prompts), self.length)
        return self.model.encode_text(tokens.to(self.model.logit_scale.device))

    def cosine_similarity(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the cosine of each image and its prompt."""
        return F.cosine_similarity(self.encode_images(images), self.encode_prompts(prompts))

    def describe_cut_prompts(self, prompts: Sequence[str]) -> str:
        """Return a remark on how many prompts are cut, or "" if none is.

        A prompt is cut if one more token of length changes the tokens that are read.
        """
        tokens = self.tokenize(list(prompts), self.length)
        more = self.tokenize(list(prompts), self.length + 1)
        count = int((more[:, : self.length] != tokens).any(1).sum())
        if not count:
            return ""
        return f"{count} of {len(prompts)} prompts were cut at {self.length} tokens"


def load_clip(path: str, quick_gelu: bool) -> tuple[CLIPBackbone, str]:
    """Load a folder in open_clip's layout, and describe the model and its source in words.

    Raises:
        UserError: if the folder is not such a model, or its weights are broken or another model's.
    """
    name = f"local-dir:{require_weights(path)}"
    try:
        model = open_clip.create_model(name, force_quick_gelu=quick_gelu, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a broken file makes open_clip raise almost anything
        raise UserError(
            f"{path} is not a CLIP in open_clip's layout: {shorten_error(error)}"
        ) from error
    config = open_clip.get_model_config(name) or {}
    image = read_preprocess_config(model)
    preprocessing = f"{image.resize_mode} side to its size, {image.interpolation}, centre crop"
    assert tokenizer.context_length
    backbone = CLIPBackbone(model, make_preprocess(image), tokenizer, tokenizer.context_length)
    source = f"{path} in open_clip {open_clip.__version__}"
    return backbone, f"{source}: {describe_backbone(config, quick_gelu)}; {preprocessing}"


def shorten_error(error: Exception) -> str:
    """Return an error message on one line, without the names of all weights of a large model."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_ERROR_LENGTH else f"{text[:MAX_ERROR_LENGTH]} ..."


def describe_backbone(config: Mapping[str, Any], quick_gelu: bool = False) -> str:
    """Return the kind and the size of the image encoder, from open_clip's config of a model."""
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        return vision.timm_model_name
    kind = "ViT" if isinstance(vision.layers, int) else "ResNet"
    activation = "QuickGELU" if quick_gelu or config.get("quick_gelu") else "GELU"
    size = f"{vision.layers} layers, width {vision.width}, patch {vision.patch_size}"
    return f"{kind} ({size}, {vision.image_size} pixels, {activation})"


def read_preprocess_config(model: nn.Module) -> PreprocessCfg:
    """Return the preparation of images that a model of open_clip asks for."""
    return PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))


def make_preprocess(config: PreprocessCfg) -> Compose:
    """Return open_clip's preparation of images for inference, on tensors in [0, 1].

    Unlike open_clip's, which works on PIL images, it does not round to 8 bits on the way.

    Raises:
        UserError: if the model pads its images.
    """
    size = [config.size] * 2 if isinstance(config.size, int) else list(config.size)
    if config.resize_mode == "longest":
        raise UserError(
            "a CLIP that pads its images to a square (resize_mode: longest) cannot be used here"
        )
    resize = Resize(
        size if config.resize_mode == "squash" else min(size),
        InterpolationMode(config.interpolation),
        antialias=True,
    )
    normalize = Normalize(config.mean, config.std)
    return Compose([resize, clamp_pixels, CenterCrop(size), normalize])


def clamp_pixels(images: Images) -> Images:
    """Clamp pixels to [0, 1].

    Bicubic interpolation overshoots, which rounding to 8 bits would have clamped.
    """
    return images.clamp(0, 1)
