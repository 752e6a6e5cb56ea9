"""Read the folder of a transformer as diffusers writes it: config.json and weight files."""

import json
from pathlib import Path
from typing import Any

import torch

from fp4dit.packed.encoding.integrity import DTYPES, open_safetensors
from fp4dit.utils.errors import UserError

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def find_transformer(path: str) -> Path:
    """Return the folder of a transformer.

    Args:
        path: the folder itself, or that of a pipeline.

    Raises:
        UserError: if there is no such transformer.
    """
    root = Path(path).expanduser()
    folder = root / "transformer" if (root / "model_index.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise UserError(f"path={path}: there is no config.json of a transformer or its pipeline")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), dict):
        raise UserError(f"{folder}/config.json is damaged: it is not a config of a model")
    return config


def read_saved_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the tensors that are not quantized; fp32 if they differ in it."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with open_safetensors(path) as (header, _):
            for name, entry in header.items():
                if name.endswith((".weight", ".bias")):
                    dtypes.add(entry["dtype"])
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32


def require_new_folder(out: str) -> Path:
    """Return the path of a folder that does not exist yet, or is empty.

    Raises:
        UserError: if there is a file or a folder with contents.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={out}: it exists and is not empty; give a new folder")
    return folder
