"""Texts as a model reads them, computed once: with these it draws without its text encoder.

A safetensors file. Tensors: `embeds` [n, tokens, width] and `mask` [n, tokens], 1 where a token is of the text.
Metadata, entry `prompts`: JSON, the n texts in order, the empty one among them, which guidance leads away from.
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

from fp4dit.errors import UserError
from fp4dit.store import whole
from fp4dit.tensors import save_tensors

MAKE = (
    "make one where the text encoder is, with `python -m pipelines.embed out=/a/file.safetensors` and the options "
    "model, prompts and calibration of the run"
)

Texts = tuple[Float[Tensor, "n tokens width"], Int[Tensor, "n tokens"]]


@dataclass(frozen=True)
class Embeddings:
    """Those in a file."""

    path: str

    @cached_property
    def places(self) -> dict[str, int]:
        """Raises UserError if there is no such file, or it is another one."""
        if not Path(self.path).is_file():
            raise UserError(f"there is no file of embeddings at {self.path}: {MAKE}")
        try:
            with safe_open(self.path, "pt") as file:
                return {prompt: i for i, prompt in enumerate(json.loads(file.metadata()["prompts"]))}
        except Exception as error:
            raise UserError(f"{self.path} is no file of embeddings: {MAKE}") from error

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError if one is not there."""
        missing = [prompt for prompt in ("", *prompts) if prompt not in self.places]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise UserError(f"{self.path} has no embedding of the prompt {missing[0]!r}{more}: {MAKE}")

    def of(self, prompts: Sequence[str]) -> Texts:
        """Raises UserError if one is not there."""
        self.check(prompts)
        with safe_open(self.path, "pt") as file:
            embeds, mask = file.get_slice("embeds"), file.get_slice("mask")
            places = [self.places[prompt] for prompt in prompts]
            return torch.cat([embeds[i : i + 1] for i in places]), torch.cat([mask[i : i + 1] for i in places])


def write(embed: Callable[[Sequence[str]], Texts], prompts: Sequence[str], path: Path, size: int = 8) -> int:
    """What `embed` makes of each prompt and of the empty one, `size` at a time, into a file; how many these are."""
    texts = list(dict.fromkeys(["", *prompts]))
    parts = [embed(texts[start : start + size]) for start in range(0, len(texts), size)]
    embeds, mask = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    save(texts, embeds, mask, path)
    return len(texts)


def save(
    prompts: Sequence[str], embeds: Float[Tensor, "n tokens width"], mask: Int[Tensor, "n tokens"], path: Path
) -> None:
    with whole(path) as part:
        save_tensors({"embeds": embeds, "mask": mask}, part, {"prompts": json.dumps(prompts)})
