"""Write the trained parts in 16 bits: a diffusers pipeline, an open_clip model and an oracle."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import PixArtSigmaPipeline
from open_clip import CLIP
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5EncoderModel

from fp4dit.pretraining.architecture import build_clip_config, build_scheduler, build_transformer
from fp4dit.pretraining.parts import load_autoencoder, locate_part
from fp4dit.utils import pytree_io
from fp4dit.utils.safetensors_io import save_tensors
from fp4dit.worlds.base import World
from fp4dit.worlds.emoji.oracle import ORACLE

AVERAGE = "average.module."


def export_model(world: World, parts: str, out: str) -> None:
    """Write a trained model.

    Args:
        world: The world that the model was trained on.
        parts: The folder of the trainings. A part that was not trained there is copied from the
            weights that ship.
        out: The folder to write to.
    """
    root, folder = Path(parts), Path(out)
    state = pytree_io.load_tree(root / "transformer/last.safetensors")["state_dict"]
    average = {
        name.removeprefix(AVERAGE): value
        for name, value in state.items()
        if name.startswith(AVERAGE)
    }
    blocks = {name.split(".")[1] for name in average if name.startswith("transformer_blocks.")}
    vae = load_autoencoder(world, root)
    latents: int = vae.config.latent_channels  # pyright: ignore[reportAttributeAccessIssue]
    transformer = build_transformer(world, len(blocks), latents)
    transformer.load_state_dict(average)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(locate_part(world, root, "text/tokenizer"))
    clip = open_clip.create_model(f"local-dir:{locate_part(world, root, 'clip/clip')}")
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel.from_pretrained(locate_part(world, root, "text/text_encoder")),
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    # transformers computes in the dtype of this file, diffusers in float32 by default. They must
    # agree.
    amend_json(folder / "text_encoder/config.json", dtype="float32")
    # Every version of transformers knows this class name.
    amend_json(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    amend_json(
        folder / "tokenizer/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    )
    save_clip(world, clip, tokenizer, folder / "clip", torch.float16)  # pyright: ignore[reportArgumentType]
    amend_json(folder / "clip/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    oracle = locate_part(world, root, f"oracle/{ORACLE}")  # a world may have a trained one
    if oracle.exists() and oracle != folder / ORACLE:
        shutil.copyfile(oracle, folder / ORACLE)


def amend_json(path: Path, **values: Any) -> None:
    """Set values of a JSON object in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def save_clip(
    world: World,
    model: CLIP,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a CLIP in open_clip's layout.

    `open_clip.create_model_from_pretrained("local-dir:...")` loads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "size": [world.image_size, world.image_size],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    config = {"model_cfg": build_clip_config(world, len(tokenizer)), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_tensors(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
