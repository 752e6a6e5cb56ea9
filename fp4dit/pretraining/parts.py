"""The folders of trained parts, which the next part and the export read."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from fp4dit.worlds.base import World


def locate_part(world: World, parts: Path, path: str) -> Path:
    """Return the folder of a part, such as "text/tokenizer".

    It lies in the trainings' folder `parts` if it was trained there, else in the weights that ship.
    """
    trained = parts / path
    return trained if trained.exists() else world.weights / Path(path).name


def load_autoencoder(world: World, parts: Path) -> AutoencoderKL:
    """Return the autoencoder whose decoder was trained longest, in float32."""
    for name in ("decoder", "autoencoder"):
        if (parts / name / "vae").exists():
            return AutoencoderKL.from_pretrained(parts / name / "vae", torch_dtype=torch.float32)
    return AutoencoderKL.from_pretrained(world.weights / "vae", torch_dtype=torch.float32)
