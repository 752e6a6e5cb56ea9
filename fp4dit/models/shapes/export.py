"""Write the trained parts as the model that ships: a diffusers pipeline and an open_clip model, in 16 bits."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import PixArtSigmaPipeline
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from fp4dit import tree
from fp4dit.models.shapes import build
from fp4dit.models.shapes.clip import save_clip
from fp4dit.models.shapes.recipe import load_vae, part

AVERAGE = "average.module."


def export(parts: str, out: str) -> None:
    """`parts` is the folder of the trainings; those not trained there stay as they ship."""
    root, folder = Path(parts), Path(out)
    state = tree.load(root / "transformer/last.safetensors")["state_dict"]
    average = {name.removeprefix(AVERAGE): value for name, value in state.items() if name.startswith(AVERAGE)}
    layers = len({name.split(".")[1] for name in average if name.startswith("transformer_blocks.")})
    transformer = build.transformer(layers)
    transformer.load_state_dict(average)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(part(root, "text/tokenizer"))
    clip = open_clip.create_model(f"local-dir:{part(root, 'clip/clip')}")
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel.from_pretrained(part(root, "text/text_encoder")),
        vae=load_vae(root),
        transformer=transformer,
        scheduler=build.scheduler(),  # pyright: ignore[reportArgumentType]
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    # transformers computes in the dtype it finds here, diffusers in float32 unless told otherwise: let them agree.
    amend(folder / "text_encoder/config.json", dtype="float32")
    # The name that every version of transformers knows.
    amend(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    amend(folder / "tokenizer/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    save_clip(clip, tokenizer, folder / "clip", torch.float16)  # pyright: ignore[reportArgumentType]
    amend(folder / "clip/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def amend(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")
