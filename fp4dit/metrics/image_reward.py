"""ImageReward (arXiv:2304.05977): how people who compare images would rate one, given its prompt.

The reward is read from the prompt's [CLS] token; [ENC], which BLIP puts in its place to match texts with images, is not
used by the authors' code.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import transformers
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from fp4dit.errors import UserError
from fp4dit.metrics.base import Images, PerImage
from fp4dit.metrics.blip import Sizes, load
from fp4dit.weights import need

TOKENS = 35  # that are read of a prompt, [CLS] and [SEP] included
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's answers, by the authors
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageReward(PerImage):
    """The standardised reward: negative for images that are worse than average.

    `path` is the published ImageReward.pt, the tokenizer's is BERT's tokenizer.json; `fp4dit.weights` finds both.
    """

    higher_is_better = True

    def __init__(self, path: str, tokenizer: Mapping[str, str], sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.tokenizer = words(tokenizer["path"], sizes.words)
        self.model = load(need(path), sizes)
        self.preprocess = preprocessing(sizes.pixels)
        self.about = (
            f"ImageReward of {path} in transformers {transformers.__version__}; images resized to {sizes.pixels} by an "
            f"antialiasing bicubic filter; up to {TOKENS} tokens of a prompt, by {tokenizer['path']}"
        )

    @torch.no_grad()
    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        read = self.tokenizer.encode_batch(list(prompts))
        ids = torch.tensor([text.ids for text in read], device=images.device)
        mask = torch.tensor([text.attention_mask for text in read], device=images.device)
        return (self.model(self.preprocess(images), ids, mask) - MEAN) / STD

    def note(self, prompts: Sequence[str]) -> str:
        cut = sum(bool(text.overflowing) for text in self.tokenizer.encode_batch(list(prompts)))
        return f"reads only the first {TOKENS} tokens of {cut} of {len(prompts)} prompts" if cut else ""


def preprocessing(pixels: int) -> Compose:
    """The authors', but for the 8 bits of their PIL images: 0.3 of 255 levels on average, up to 20 at hard edges, where
    PIL cuts what overshoots between its two passes and here it is cut after both."""
    resize = Resize(pixels, InterpolationMode.BICUBIC, antialias=True)
    return Compose([resize, partial(torch.clamp, min=0, max=1), CenterCrop(pixels), Normalize(CLIP_MEAN, CLIP_STD)])


def words(spec: str, count: int) -> Tokenizer:
    """BERT's tokenizer and BLIP's two additions, for which the embedding has rows.

    Raises:
        UserError: if it is none of as many words.
    """
    file = need(spec)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the class that tokenizers raises
        raise UserError(f"{spec} is no tokenizer.json: {error}") from error
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    if tokenizer.get_vocab_size() != count:
        raise UserError(f"{spec} has {tokenizer.get_vocab_size() - 2} words where ImageReward's has {count - 2}")
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return tokenizer
