"""Make a tiny random CLIP with the full vocabulary, for transformers and for open_clip."""

import json
from functools import cache
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SIZE, WIDTH, LAYERS, HEADS, PATCH = 32, 32, 2, 2, 8

ARCHITECTURE = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": 16,
        "patch_size": PATCH,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    },
}

PROMPTS = ["A photo of a cat.", 'Two "red" cubes, café', "a dog " * 50, "", "it's 1987 at the lake"]


def make_clip(activation: str) -> CLIPModel:
    """Return a CLIP with random weights; `activation` is gelu or quick_gelu."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    tower |= {"num_attention_heads": HEADS, "hidden_act": activation}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**tower, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if name != "logit_scale":
                value += 0.2 * torch.randn(value.shape)
    return model


@cache
def make_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer in transformers, with the vocabulary of open_clip."""
    tokenizer = open_clip.SimpleTokenizer()
    words = [*list(tokenizer.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, list(tokenizer.bpe_ranks))


def convert_to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """Return the weights under the names of open_clip."""
    state = model.state_dict()
    converted = {"logit_scale": state["logit_scale"]}
    for theirs, ours in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for i in range(LAYERS):
            layer, block = f"{theirs}.encoder.layers.{i}", f"{ours}.resblocks.{i}"
            parts = (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("self_attn.out_proj", "attn.out_proj"),
            )
            for a, b in (*parts, ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                converted |= {
                    f"{block}.{b}.{kind}": state[f"{layer}.{a}.{kind}"]
                    for kind in ("weight", "bias")
                }
            for kind in ("weight", "bias"):
                converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                )
    norms = (
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
    )
    for a, b in norms:
        converted |= {f"{b}.{kind}": state[f"{a}.{kind}"] for kind in ("weight", "bias")}
    return converted | {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }


def save_open_clip(model: CLIPModel, folder: Path, **config: bool) -> Path:
    """Save a folder in open_clip's layout; `config` is added to the model's config."""
    folder.mkdir()
    content = {"model_cfg": {**ARCHITECTURE, **config}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    weights = {name: value.contiguous() for name, value in convert_to_open_clip(model).items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def draw_pictures(
    count: int, height: int, width: int, seed: int = 0
) -> tuple[Tensor, list[Image.Image]]:
    """Return smooth 8-bit noise as tensors and as PIL images."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=random)
    images = (
        torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        .mul(255)
        .round()
        .byte()
    )
    return images / 255, [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
