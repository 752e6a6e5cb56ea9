"""Prompt embeddings in a safetensors file, to sample images without a text encoder.

The file holds two tensors: `embeds` [n, tokens, width], and `mask` [n, tokens], which is 0 at
padding tokens. The entry `prompts` of its metadata is a JSON list of the n prompts in order. It
contains the empty prompt, which classifier-free guidance needs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write
from fp4dit.utils.safetensors_io import save_tensors

INSTRUCTIONS = (
    "make one where the text encoder is, with `python -m pipelines.embed out=/a/file.safetensors` "
    "and the options model, prompts and calibration of the run"
)

# The outputs of a text encoder, and their masks.
EncodedPrompts = tuple[Float[Tensor, "n tokens width"], Int[Tensor, "n tokens"]]


@dataclass(frozen=True)
class PromptEmbeddings:
    """Prompt embeddings stored in a safetensors file.

    Args:
        path: The file, as `embed_prompts` writes it.

    Example:
        >>> embeds, mask = PromptEmbeddings("texts.safetensors").select(["a red square"])
    """

    path: str

    @cached_property
    def indices(self) -> dict[str, int]:
        """The position of each prompt in the file.

        Raises:
            UserError: if there is no file, or if it does not hold embeddings.
        """
        if not Path(self.path).is_file():
            raise UserError(f"there is no file of embeddings at {self.path}: {INSTRUCTIONS}")
        try:
            with safe_open(self.path, "pt") as file:
                prompts = json.loads(file.metadata()["prompts"])
                return {prompt: i for i, prompt in enumerate(prompts)}
        except Exception as error:
            raise UserError(f"{self.path} is not a file of embeddings: {INSTRUCTIONS}") from error

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Check that the file holds all prompts and the empty one.

        Raises:
            UserError: if prompts are missing. It names the first one.
        """
        missing = [prompt for prompt in ("", *prompts) if prompt not in self.indices]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise UserError(
                f"{self.path} has no embedding of the prompt {missing[0]!r}{more}: {INSTRUCTIONS}"
            )

    def select(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Read the embeddings and the masks of some prompts.

        Raises:
            UserError: if a prompt is missing.
        """
        self.check_prompts(prompts)
        with safe_open(self.path, "pt") as file:
            embeds, mask = file.get_slice("embeds"), file.get_slice("mask")
            indices = [self.indices[prompt] for prompt in prompts]
            return (
                torch.cat([embeds[i : i + 1] for i in indices]),
                torch.cat([mask[i : i + 1] for i in indices]),
            )


def embed_prompts(
    encode: Callable[[Sequence[str]], EncodedPrompts],
    prompts: Sequence[str],
    path: Path,
    batch_size: int = 8,
) -> int:
    """Embed each distinct prompt and the empty one, and save them to a file.

    Args:
        encode: Returns the embeddings and the masks of a batch of prompts.
        prompts: The prompts.
        path: The file to write.
        batch_size: The number of prompts that are encoded at once.

    Returns:
        The number of embeddings.
    """
    texts = list(dict.fromkeys(["", *prompts]))
    embeds, masks = [], []
    for start in range(0, len(texts), batch_size):
        batch_embeds, batch_mask = encode(texts[start : start + batch_size])
        embeds.append(batch_embeds)
        masks.append(batch_mask)
    save_embeddings(texts, torch.cat(embeds).cpu(), torch.cat(masks).cpu(), path)
    return len(texts)


def save_embeddings(
    prompts: Sequence[str],
    embeds: Float[Tensor, "n tokens width"],
    mask: Int[Tensor, "n tokens"],
    path: Path,
) -> None:
    """Write a file of prompt embeddings."""
    with atomic_write(path) as part:
        save_tensors({"embeds": embeds, "mask": mask}, part, {"prompts": json.dumps(prompts)})
