"""The small CLIP in open_clip's own layout, for `open_clip.create_model_from_pretrained("local-dir:...")`."""

import json
from pathlib import Path

import torch
from open_clip import CLIP
from transformers import PreTrainedTokenizerBase

from fp4dit.models.shapes.build import clip_config
from fp4dit.models.shapes.world import SIZE
from fp4dit.tensors import save_tensors

PREPROCESS = {
    "size": [SIZE, SIZE],
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def save_clip(
    model: CLIP, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": clip_config(len(tokenizer)), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_tensors(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
