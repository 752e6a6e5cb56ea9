"""Measure a world's model on held-out captions, and write the figures into its model card."""

from collections.abc import Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from random import Random

import torch
from diffusers import PixArtSigmaPipeline
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from fp4dit.lowbit_training.linear import TrainRule, replace_linear_layers_
from fp4dit.metrics.clip import CLIPScore
from fp4dit.metrics.full_reference import PSNR
from fp4dit.utils.statistics import compute_interval
from fp4dit.worlds.base import Scene, World

# The lines of a model card between which the figures stand.
BEGIN = "<!-- figures: written by part=evaluate evaluate.card=true -->"
END = "<!-- end of figures -->"
Images = Float[Tensor, "n 3 h w"]


def evaluate_model(
    world: World,
    weights: str,
    images: int,
    steps: int,
    guidance: float,
    chunk: int,
    seed: int,
    linear: Sequence[TrainRule] = (),
    card: bool = False,
) -> None:
    """Print the figures of the model in the folder `weights`.

    Args:
        world: The source of held-out scenes, and the judge.
        weights: The folder of the model.
        images: The number of images, one per scene.
        steps: The number of sampling steps.
        guidance: The scale of classifier-free guidance.
        chunk: The number of images drawn at once; another number changes them.
        seed: The seed of scenes and noise.
        linear: The rules of low-bit training that the transformer was trained by; it draws by them
            too.
        card: Whether to write the figures into README.md of the folder, and a picture beside it.
    """
    folder = Path(weights)
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    replace_linear_layers_(pipe.transformer, linear)
    pipe.set_progress_bar_config(disable=True)
    scenes = list(islice(world.iterate_scenes(seed, held_out=True), images))
    captions = [scene.caption for scene in scenes]
    truth, generated, decoded = make_pictures(world, pipe, scenes, steps, guidance, chunk, seed)
    shuffled = Random(seed).sample(captions, len(captions))
    clip = CLIPScore(str(folder / "clip"))
    rows = [
        format_figures(world, "generated images", generated, captions, clip),
        format_figures(world, "generated images, captions shuffled", generated, shuffled, clip),
        format_figures(world, "rendered truths", truth, captions, clip),
        format_figures(world, "rendered truths, captions shuffled", truth, shuffled, clip),
        format_figures(world, "rendered truths through the autoencoder", decoded, captions, clip),
    ]
    origin = (
        f"{len(captions)} held-out captions, {steps} DPM-Solver++ steps, guidance {guidance}; "
        f"{date.today()}, `python -m pipelines.pretrain world={world.name} part=evaluate "
        f"evaluate.images={images}`. 95 % intervals."
    )
    psnr = PSNR().score(decoded, truth, captions)
    table = format_table(world, origin, rows, psnr.tolist())
    print(table)
    if card:
        write_card(folder, table, generated)


def make_pictures(
    world: World,
    pipe: PixArtSigmaPipeline,
    scenes: Sequence[Scene],
    steps: int,
    guidance: float,
    chunk: int,
    seed: int,
) -> tuple[Images, Images, Images]:
    """Return images in [0, 1]: rendered truths, the model's, and truths through the autoencoder."""
    truths, drawn, restored = [], [], []
    for number, start in enumerate(tqdm(range(0, len(scenes), chunk), "images")):
        part = scenes[start : start + chunk]
        captions = [scene.caption for scene in part]
        truths.append(world.render_scenes(part) / 2 + 0.5)
        drawn.append(draw_images(world, pipe, captions, steps, guidance, seed + number))
        restored.append(restore_images(pipe, truths[-1]))
    return torch.cat(truths), torch.cat(drawn), torch.cat(restored)


@torch.no_grad()
def draw_images(
    world: World,
    pipe: PixArtSigmaPipeline,
    captions: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
) -> Images:
    """Return the model's images in [0, 1] for these captions."""
    return pipe(
        list(captions),
        negative_prompt="",
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=world.image_size,
        width=world.image_size,
        max_sequence_length=world.tokens,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images.float()  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def restore_images(pipe: PixArtSigmaPipeline, images: Images) -> Images:
    """Return images in [0, 1], encoded and decoded by the autoencoder."""
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def format_figures(
    world: World, name: str, images: Images, captions: Sequence[str], clip: CLIPScore
) -> str:
    """Return a row of the table: the share of each verdict, and the CLIP score."""
    verdicts = world.judge_images(images, captions)
    cells = [name]
    for key in world.verdicts:
        share = compute_interval([float(value) for value in verdicts[key]])
        cells.append(f"{100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]")
    score = compute_interval(clip.score(images, images, captions).tolist())
    cells.append(f"{score.mean:.1f} [{score.low:.1f}, {score.high:.1f}]")
    return f"| {' | '.join(cells)} |"


def format_table(world: World, origin: str, rows: Sequence[str], psnr: Sequence[float]) -> str:
    """Return the text of the figures in Markdown.

    Args:
        world: The judge.
        origin: The sentences above the table.
        rows: The rows of the table, by `format_figures`.
        psnr: The autoencoder's PSNR for each image.
    """
    fidelity = compute_interval(psnr)
    interval = f"[{fidelity.low:.1f}, {fidelity.high:.1f}]"
    lines = [
        origin,
        "",
        f"| | {' | '.join(world.verdicts)} | CLIP score |",
        f"|---|{'---:|' * (len(world.verdicts) + 1)}",
        *rows,
        "",
        f"The autoencoder's PSNR is {fidelity.mean:.1f} dB {interval}.",
    ]
    return "\n".join(lines)


def write_card(folder: Path, table: str, images: Images) -> None:
    """Write the figures into README.md of the folder, and some of the images beside it."""
    save_image(images[:32], folder / "sample.png", nrow=8)
    page = folder / "README.md"
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    page.write_text(insert_table(text, table))


def insert_table(card: str, table: str) -> str:
    """Return the card with `table` between its markers."""
    before, rest = card.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"
