"""A transformer's folder, as diffusers lays it out: the config, and the files with weights."""

import json
from pathlib import Path
from typing import Any

import torch

from fp4dit.errors import UserError
from fp4dit.packed.checkpoint import DTYPES, opened


def transformer(path: str, method: str) -> Path:
    """That of a pipeline's folder, or the folder itself, quantized by this method.

    Raises:
        UserError: if there is none.
    """
    root = Path(path).expanduser()
    folder = root / "transformer" if (root / "model_index.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise UserError(f"path={path}: there is no config.json of a transformer or its pipeline")
    own = described_by(folder).get("quantization_config", {}).get("quant_method")
    if own != method:
        raise UserError(f"the transformer in {folder} is quantized by {own}, and has to be by {method}")
    return folder


def described_by(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from error


def saved_dtype(folder: Path) -> torch.dtype:
    """Of what is not quantized; fp32 where that differs."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with opened(path) as (header, _):
            found |= {entry["dtype"] for name, entry in header.items() if name.endswith((".weight", ".bias"))}
    return DTYPES[found.pop()] if len(found) == 1 else torch.float32


def new(out: str) -> Path:
    """Raises UserError if something is there."""
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={out}: there is something; give a new folder")
    return folder
