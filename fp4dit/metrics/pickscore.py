"""PickScore (arXiv:2305.01569): a model of which image of a prompt people prefer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from open_clip.transform import PreprocessCfg
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPModel

from fp4dit.metrics.base import Images, PerImageMetric
from fp4dit.metrics.clip_backbone import CLIPBackbone, make_preprocess, shorten_error
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import require_weights


class PickScore(PerImageMetric):
    """exp(logit scale) cos(image, prompt), as in the paper: about 20.

    Some tables divide it by 100, or leave out the scale.

    Args:
        path: Folder in transformers' layout, as `fp4dit.utils.hub` finds it.
        tokenizer: `path` of the model's tokenizer.json.

    Example:
        >>> metric = PickScore("/path/of/a/folder", {"path": "/path/of/tokenizer.json"})
        >>> metric.score(images, images, ["a cat", "a dog"])
        tensor([21.3, 20.8])
    """

    title, digits, higher_is_better = "PickScore", 2, True

    def __init__(self, path: str, tokenizer: Mapping[str, str]) -> None:
        super().__init__()
        model = load_pickscore(path)
        vision, text = model.config.vision_config, model.config.text_config
        self.scale = model.logit_scale.detach().exp().item()
        self.backbone = CLIPBackbone(
            OpenClipAdapter(model),
            make_preprocess(PreprocessCfg(vision.image_size)),
            CLIPTokenizer(tokenizer["path"]),
            text.max_position_embeddings,
        )
        size = (
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
            f"patch {vision.patch_size}, {vision.image_size} pixels"
        )
        self.about = (
            f"PickScore, exp(logit scale) cos, of {path} in transformers "
            f"{transformers.__version__}: ViT ({size}); shortest side to its size, bicubic, "
            "centre crop"
        )

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        return self.scale * self.backbone.cosine_similarity(images, prompts)

    def describe_cut_prompts(self, prompts: Sequence[str]) -> str:
        return self.backbone.describe_cut_prompts(prompts)


def load_pickscore(path: str) -> Any:
    """Load a CLIP of transformers in fp32.

    Raises:
        UserError: if the folder is not such a model, or its weights are broken or another model's.
    """
    folder = str(require_weights(path))
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a broken file makes transformers raise almost anything
        raise UserError(
            f"{path} is not a CLIP in transformers' layout: {shorten_error(error)}"
        ) from error
    model, loading_info = loaded
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(
            f"{path} is not a CLIP of transformers: it lacks {missing[0]} ({len(missing)} in all)"
        )
    return model


class OpenClipAdapter(nn.Module):
    """A CLIP of transformers with the interface of open_clip's.

    Args:
        model: CLIP of transformers.

    Example:
        >>> adapter = OpenClipAdapter(load_pickscore("/path/of/a/pickscore"))
        >>> adapter.encode_image(pixels).shape == adapter.encode_text(tokens).shape
        True
    """

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model: Any = model
        self.logit_scale = model.logit_scale

    def encode_image(self, images: Images) -> Float[Tensor, "n d"]:
        return self.model.get_image_features(images).pooler_output

    def encode_text(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
        return self.model.get_text_features(tokens).pooler_output


class CLIPTokenizer:
    """Tokenizer of a tokenizer.json with the interface of open_clip's.

    It pads with the end token, because CLIP reads nothing after the first one.

    Args:
        path: Location of tokenizer.json, as `fp4dit.utils.hub` finds it.

    Raises:
        UserError: if the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        file = str(require_weights(path))
        try:
            self.tokenizer = Tokenizer.from_file(file)
        except Exception as error:  # tokenizers has no class of its own for a broken file
            raise UserError(
                f"{path} cannot be read as a tokenizer.json: {shorten_error(error)}"
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, prompts: list[str], length: int) -> Int[Tensor, "n length"]:
        rows = []
        for encoding in self.tokenizer.encode_batch(prompts):
            end_token = encoding.ids[-1:]
            ids = encoding.ids[: length - 1] + end_token * length
            rows.append(ids[:length])
        return torch.tensor(rows)
