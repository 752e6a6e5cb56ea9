"""How the shipped model comes about: each part's training task, and the folders in which parts wait for the next.

A part that was not trained here is taken from the weights that ship, so that any part can be trained further.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from fp4dit.models.shapes import build
from fp4dit.models.shapes.clip import save_clip
from fp4dit.models.shapes.world import render, scenes
from fp4dit.tasks.pretrain import AutoencoderTask, ClipTask, DenoisingTask, TextTask
from fp4dit.training.layer import TrainRule, train_in_few_bits_

SHIPPED = Path(__file__).parent / "weights"


def part(parts: Path, path: str) -> Path:
    """Where `path` ("autoencoder/vae", "text/tokenizer", ...) was trained, or else ships."""
    trained = parts / path
    return trained if trained.exists() else SHIPPED / Path(path).name


def autoencoder(lr: float, steps: int) -> AutoencoderTask:
    return AutoencoderTask(build.autoencoder(), lr, steps)


@torch.no_grad()
def save_autoencoder(task: AutoencoderTask, folder: Path, n: int = 1024) -> None:
    """With the `scaling_factor` that gives the latents of `n` scenes a standard deviation of 1."""
    vae, stream = task.model.eval(), scenes(seed=1, held_out=False)
    images = [render(list(islice(stream, min(n, 64)))).to(vae.device) for _ in range(max(1, n // 64))]
    latents = torch.cat([vae.encode(image).latent_dist.mode() for image in images])  # pyright: ignore[reportAttributeAccessIssue]
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder / "vae")


def decoder(parts: str, lr: float, steps: int, absolute: float) -> AutoencoderTask:
    """The autoencoder's decoder further, its latents unchanged: a trained transformer still fits."""
    vae = load_vae(Path(parts))
    task = AutoencoderTask(vae, lr, steps, absolute=absolute)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
    return task


def save_decoder(task: AutoencoderTask, folder: Path) -> None:
    task.model.save_pretrained(folder / "vae")


def load_vae(parts: Path) -> AutoencoderKL:
    trained = [parts / name / "vae" for name in ("decoder", "autoencoder")]
    folder = next((path for path in trained if path.exists()), SHIPPED / "vae")
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)


def text(lr: float, steps: int) -> TextTask:
    tokenizer = build.tokenizer()
    return TextTask(build.text_encoder(len(tokenizer)), tokenizer, lr, steps)


def save_text(task: TextTask, folder: Path) -> None:
    task.text_encoder.save_pretrained(folder / "text_encoder")
    task.tokenizer.save_pretrained(folder / "tokenizer")


def clip(lr: float, steps: int) -> ClipTask:
    tokenizer = build.tokenizer()
    return ClipTask(build.clip(len(tokenizer)), tokenizer, lr, steps)


def save_trained_clip(task: ClipTask, folder: Path) -> None:
    save_clip(task.clip, task.tokenizer, folder / "clip")


def transformer(
    steps: int,
    lr: float,
    muon_lr: float,
    levels: int,
    drop: float,
    decay: float,
    layers: int,
    further: bool,
    warmup: int = 100,
    compile: bool = False,
    linear: Sequence[TrainRule] = (),
    parts: str | None = None,
) -> DenoisingTask:
    """`further` goes on from the weights that ship, if they exist; the optimizers' moments restart with a warm-up.

    `compile` makes a step a quarter faster on a CPU and needs a C++ compiler. `linear` says which linear layers are
    trained in few bits. Without `parts` all others are those that ship.
    """
    root = SHIPPED if parts is None else Path(parts)
    net = build.transformer(layers)
    if further and (SHIPPED / "transformer").exists():
        net = PixArtTransformer2DModel.from_pretrained(SHIPPED / "transformer", dtype=torch.float32)
    train_in_few_bits_(net, linear)
    if compile:
        net.compile()
    return DenoisingTask(
        net,
        load_vae(root),
        T5EncoderModel.from_pretrained(part(root, "text/text_encoder"), dtype=torch.float32),
        PreTrainedTokenizerFast.from_pretrained(part(root, "text/tokenizer")),
        build.scheduler(),
        steps,
        lr,
        muon_lr,
        levels,
        drop,
        decay,
        warmup,
    )
