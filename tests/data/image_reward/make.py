"""Make the files beside this one: outputs of image-reward 1.5, small and with random weights.

    pip install --target LIBS --no-deps transformers==4.30.2 tokenizers==0.13.3 \
        huggingface-hub==0.16.4 timm==0.6.13 fairscale==0.4.13
    pip download --no-deps image-reward==1.5 && unzip -d PACKAGE image_reward-1.5-py3-none-any.whl
    PYTHONPATH=LIBS:PACKAGE python tests/data/image_reward/make.py

No code of this project runs here. Weights are random fp16 numbers, and outputs are computed in
fp32.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer, BertTokenizerFast

HERE = Path(__file__).parent
PIXELS, WIDTH, DEPTH, HEADS = 48, 12, 2, 3
BERT = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "add_cross_attention": True,
}
PROMPTS = [
    "A red circle left of a blue square",
    "",
    "Café  À LA crème, photo-realistic!",
    "a " * 20 + "red square " * 20,
    "红 circle \N{SLIGHTLY SMILING FACE} of [ENC] redness",
    "unsquared blue, blue, 3 circles; the art of the square",
]


def skip_init(name: str) -> None:
    """Import a package without its __init__, which needs diffusers, datasets and CLIP."""
    package = types.ModuleType(name)
    package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
    sys.modules[name] = package


def write_vocabulary() -> Path:
    """Write the vocabulary of a small tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [
        "red",
        "blue",
        "circle",
        "square",
        "left",
        "of",
        "the",
        "photo",
        "real",
        "##ness",
        "##s",
        "##ed",
        "un",
    ]
    single = [*letters, *"!,.;-'红", *(f"##{letter}" for letter in letters)]
    file = HERE / "vocab.txt"
    file.write_text(
        "\n".join(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *single, *words]))
        + "\n"
    )
    return file


def build_tokenizer(file: Path) -> BertTokenizer:
    """Return the package's slow tokenizer with special tokens, and write the fast one's file."""
    BertTokenizerFast(str(file)).backend_tokenizer.save(str(HERE / "tokenizer.json"))
    slow = BertTokenizer(str(file))
    slow.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    file.unlink()
    return slow


def build_small_model(words: BertTokenizer) -> torch.nn.Module:
    """Return the package's model with smaller parts and random weights."""
    import ImageReward.ImageReward as top
    import ImageReward.models.BLIP.blip_pretrain as blip
    from ImageReward.models.BLIP.vit import VisionTransformer

    encoder = VisionTransformer(
        PIXELS, 16, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, drop_path_rate=0.1
    )
    blip.create_vit = lambda *_: (encoder, WIDTH)
    blip.init_tokenizer = lambda: words
    head, transform = top.MLP, top._transform
    top.MLP, top._transform = lambda _: head(BERT["hidden_size"]), lambda _: transform(PIXELS)
    config = HERE / "med_config.json"
    config.write_text(json.dumps(BERT | {"vocab_size": len(words)}))
    model = top.ImageReward(med_config=str(config)).eval()
    config.unlink()
    random = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        spread = value[0].numel() ** -0.5 if value.ndim in (2, 4) and "embed" not in name else 0.5
        noise = spread * torch.randn(value.shape, generator=random)
        is_norm_weight = value.ndim == 1 and "norm" in name.lower() and "weight" in name
        value.data = (noise + is_norm_weight).half().float()
    return model


@torch.no_grad()
def compute_outputs(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the package's outputs.

    Returns:
        vision: The patches of each image after every block.
        ids, mask: The tokens of each prompt.
        text: The states of prompt k with image k mod 3 after every layer.
        scores: The score of each pair of an image and a prompt.
    """
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    blocks = []
    for block in model.blip.visual_encoder.blocks:
        block.register_forward_hook(lambda _, __, output: blocks.append(output))
    patches = model.blip.visual_encoder(
        torch.stack([model.preprocess(picture) for picture in pictures])
    )
    vision = torch.stack([*blocks, patches])
    read = model.blip.tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    attended = patches[torch.arange(len(PROMPTS)) % len(images)]
    text = model.blip.text_encoder(
        read.input_ids,
        attention_mask=read.attention_mask,
        encoder_hidden_states=attended,
        encoder_attention_mask=torch.ones(attended.shape[:2], dtype=torch.long),
        output_hidden_states=True,
        return_dict=True,
    )
    scores = torch.tensor(
        [[model.score(prompt, picture) for prompt in PROMPTS] for picture in pictures]
    )
    ids = {"ids": read.input_ids, "mask": read.attention_mask}
    return ids | {"vision": vision, "text": torch.stack(text.hidden_states), "scores": scores}


def main() -> None:
    model = build_small_model(build_tokenizer(write_vocabulary()))
    images = torch.randint(256, (3, 3, 6, 6), generator=torch.Generator().manual_seed(1)).float()
    images = (
        torch.nn.functional.interpolate(images, (PIXELS, PIXELS), mode="bilinear").round().byte()
    )
    outputs = compute_outputs(model, images)
    print(outputs["scores"])
    state = {n: v.half() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    save_file(
        {name: value.contiguous() for name, value in state.items()}, HERE / "weights.safetensors"
    )
    save_file(
        {"images": images, **outputs},
        HERE / "answers.safetensors",
        {"prompts": json.dumps(PROMPTS)},
    )


skip_init("ImageReward")
skip_init("ImageReward.models")
main()
