"""PickScore: which image of a prompt people would pick (arXiv:2305.01569)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from open_clip.transform import PreprocessCfg
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPModel

from fp4dit.errors import UserError
from fp4dit.metrics.base import Images, PerImage
from fp4dit.metrics.towers import Towers, brief, preprocessing
from fp4dit.weights import need


class PickScore(PerImage):
    """exp(logit scale) cos, the score of the paper, about 20; some tables divide it by 100, or leave the scale out.

    `path` is a folder in transformers' layout, the tokenizer's is its tokenizer.json; `fp4dit.weights` finds both.
    """

    higher_is_better = True

    def __init__(self, path: str, tokenizer: Mapping[str, str]) -> None:
        super().__init__()
        model = load(path)
        image, length = model.config.vision_config, model.config.text_config.max_position_embeddings
        self.scale = model.logit_scale.detach().exp().item()
        words = Words(tokenizer["path"])
        self.towers = Towers(AsOpenClip(model), preprocessing(PreprocessCfg(image.image_size)), words, length)
        size = f"{image.num_hidden_layers} layers, width {image.hidden_size}, patch {image.patch_size}"
        self.about = (
            f"PickScore, exp(logit scale) cos, of {path} in transformers {transformers.__version__}: ViT ({size}, "
            f"{image.image_size} pixels); shortest side to its size, bicubic, centre crop"
        )

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return self.scale * self.towers.agreement(images, prompts)

    def note(self, prompts: Sequence[str]) -> str:
        return self.towers.note(prompts)


def load(path: str) -> Any:
    """In fp32. Raises UserError if it is not such a folder, or its weights are broken or another model's."""
    folder = str(need(path))
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a broken file makes transformers raise almost anything
        raise UserError(f"{path} is no CLIP in transformers' layout: {brief(error)}") from error
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):
        raise UserError(f"{path} is no CLIP of transformers: it lacks {lacking[0]} ({len(lacking)} in all)")
    return model


class AsOpenClip(nn.Module):
    """A CLIP of transformers, asked as open_clip's are."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model: Any = model
        self.logit_scale = model.logit_scale

    def encode_image(self, images: Images) -> Float[Tensor, "n d"]:
        return self.model.get_image_features(images).pooler_output

    def encode_text(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        return self.model.get_text_features(tokens).pooler_output


class Words:
    """The tokenizer of a tokenizer.json, asked as open_clip's are. What stands behind the end mark, CLIP does not read,
    so padding is more of it."""

    def __init__(self, path: str) -> None:
        file = str(need(path))
        try:
            self.tokenizer = Tokenizer.from_file(file)
        except Exception as error:  # tokenizers has no class of its own for a broken file
            raise UserError(f"{path} cannot be read as a tokenizer.json: {brief(error)}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, prompts: list[str], length: int) -> Int[Tensor, "n length"]:
        found = [encoding.ids for encoding in self.tokenizer.encode_batch(prompts)]
        return torch.tensor([(ids[: length - 1] + ids[-1:] * length)[:length] for ids in found])
