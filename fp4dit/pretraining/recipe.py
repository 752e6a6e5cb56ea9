"""The training task of each part of a world's model, and the folders that parts are saved to.

A part that was not trained in the given folder is taken from the weights that ship, so that any
part can be trained further.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from fp4dit.lowbit_training.linear import TrainRule, replace_linear_layers_
from fp4dit.pretraining import architecture
from fp4dit.pretraining.denoising import DenoisingTask
from fp4dit.pretraining.export import save_clip
from fp4dit.pretraining.parts import load_autoencoder, locate_part
from fp4dit.pretraining.tasks import AutoencoderTask, ClipTask, OracleTask, TextTask
from fp4dit.utils.safetensors_io import save_tensors
from fp4dit.worlds.base import World
from fp4dit.worlds.emoji import EmojiWorld
from fp4dit.worlds.emoji.oracle import ORACLE


def train_autoencoder(
    world: World, lr: float, steps: int, widths: Sequence[int] = (16, 32, 64), latents: int = 4
) -> AutoencoderTask:
    """Return the task of a new autoencoder."""
    return AutoencoderTask(architecture.build_autoencoder(world, widths, latents), lr, steps)


@torch.no_grad()
def save_autoencoder(task: AutoencoderTask, folder: Path, world: World, n: int = 1024) -> None:
    """Save the autoencoder with the `scaling_factor` that gives latents a standard deviation of 1.

    The deviation is measured on `n` scenes.
    """
    vae, stream = task.model.eval(), world.iterate_scenes(seed=1, held_out=False)
    latents = []
    for _ in range(max(1, n // 64)):
        images = world.render_scenes(list(islice(stream, min(n, 64)))).to(vae.device)
        latents.append(vae.encode(images).latent_dist.mode())  # pyright: ignore[reportAttributeAccessIssue]
    vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())
    vae.save_pretrained(folder / "vae")


def train_decoder(
    world: World, parts: str, lr: float, steps: int, absolute: float
) -> AutoencoderTask:
    """Return the task that trains the decoder further on unchanged latents.

    A trained transformer still fits the result.
    """
    vae = load_autoencoder(world, Path(parts))
    task = AutoencoderTask(vae, lr, steps, absolute=absolute)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
    return task


def save_decoder(task: AutoencoderTask, folder: Path) -> None:
    """Save the autoencoder with its new decoder."""
    task.model.save_pretrained(folder / "vae")


def train_text_encoder(world: World, lr: float, steps: int) -> TextTask:
    """Return the task of a new text encoder."""
    tokenizer = architecture.build_tokenizer(world)
    return TextTask(
        architecture.build_text_encoder(len(tokenizer)), tokenizer, world.word_choices, lr, steps
    )


def save_text_encoder(task: TextTask, folder: Path) -> None:
    """Save the text encoder and its tokenizer."""
    task.text_encoder.save_pretrained(folder / "text_encoder")
    task.tokenizer.save_pretrained(folder / "tokenizer")


def train_clip(world: World, lr: float, steps: int) -> ClipTask:
    """Return the task of a new CLIP."""
    tokenizer = architecture.build_tokenizer(world)
    return ClipTask(
        architecture.build_clip(world, len(tokenizer)), tokenizer, world.slot_choices, lr, steps
    )


def save_trained_clip(task: ClipTask, folder: Path, world: World) -> None:
    """Save the CLIP in open_clip's layout."""
    save_clip(world, task.clip, task.tokenizer, folder / "clip")


def train_oracle(world: EmojiWorld, parts: str, lr: float, steps: int) -> OracleTask:
    """Return the task of the emoji world's oracle network."""
    vae = load_autoencoder(world, Path(parts))
    return OracleTask(world.build_reader(), vae, world.slot_choices, lr, steps)


def save_oracle(task: OracleTask, folder: Path) -> None:
    """Save the network in 16 bits."""
    weights = {name: value.half() for name, value in task.reader.state_dict().items()}
    save_tensors(weights, folder / ORACLE, {"format": "pt"})


def train_transformer(
    world: World,
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
    """Return the task of the transformer.

    Args:
        world: The source of scenes, and of the weights that ship.
        steps: The number of batches, for the learning-rate schedule.
        lr: The learning rate of AdamW.
        muon_lr: The learning rate of Muon, for hidden matrices.
        levels: The number of noise levels per scene.
        drop: The share of captions left out, for guidance.
        decay: The decay of the running average of the weights.
        layers: The number of transformer blocks.
        further: Whether to begin with the weights that ship, if they exist. The optimizers' moments
            restart.
        warmup: The number of steps over which the rates rise.
        compile: Whether to compile the transformer. A step is then a quarter faster on a CPU. This
            needs a C++ compiler.
        linear: The rules of low-bit training of the linear layers.
        parts: The folder of the trainings that gave the other parts; None takes those that ship.
    """
    root = world.weights if parts is None else Path(parts)
    vae = load_autoencoder(world, root)
    latents: int = vae.config.latent_channels  # pyright: ignore[reportAttributeAccessIssue]
    net = architecture.build_transformer(world, layers, latents)
    if further and (world.weights / "transformer").exists():
        net = PixArtTransformer2DModel.from_pretrained(
            world.weights / "transformer", dtype=torch.float32
        )
    replace_linear_layers_(net, linear)
    if compile:
        net.compile()
    return DenoisingTask(
        net,
        vae,
        T5EncoderModel.from_pretrained(
            locate_part(world, root, "text/text_encoder"), dtype=torch.float32
        ),
        PreTrainedTokenizerFast.from_pretrained(locate_part(world, root, "text/tokenizer")),
        architecture.build_scheduler(),
        steps,
        lr,
        muon_lr,
        levels,
        drop,
        decay,
        warmup,
    )
