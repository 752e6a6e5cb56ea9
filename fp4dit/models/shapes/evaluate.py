"""Measure the shipped model on held-out captions; on demand, write the figures into its model card."""

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

from fp4dit.metrics.clip import ClipScore
from fp4dit.metrics.psnr import Psnr
from fp4dit.models.shapes.build import TOKENS
from fp4dit.models.shapes.oracle import judge
from fp4dit.models.shapes.world import SIZE, render, scenes
from fp4dit.statistics import interval
from fp4dit.training.layer import TrainRule, train_in_few_bits_

BEGIN, END = "<!-- figures: written by part=evaluate evaluate.card=true -->", "<!-- end of figures -->"
VERDICTS = ("shapes", "colours", "relation", "all")
Images = Float[Tensor, "n 3 h w"]


def evaluate(
    weights: str,
    images: int,
    steps: int,
    guidance: float,
    chunk: int,
    seed: int,
    linear: Sequence[TrainRule] = (),
    card: bool = False,
) -> None:
    """On the captions of `images` held-out scenes; `chunk` are made at once, and are part of what makes the bits.

    `linear` is what the transformer was trained by: it draws in as few bits. With `card` the figures go into README.md
    beside the weights, and a picture beside that: who only looks should not change what is tracked.
    """
    folder = Path(weights)
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    train_in_few_bits_(pipe.transformer, linear)
    pipe.set_progress_bar_config(disable=True)
    batches = chunks(list(islice(scenes(seed, held_out=True), images)), chunk)
    truth = torch.cat([render(batch) for batch in batches]) / 2 + 0.5
    captions = [[scene.caption for scene in batch] for batch in batches]
    made = torch.cat([draw(pipe, c, steps, guidance, seed + i) for i, c in enumerate(tqdm(captions, "images"))])
    restored = torch.cat([restore(pipe, part) for part in truth.split(chunk)])
    said = [caption for batch in captions for caption in batch]
    mixed = Random(seed).sample(said, len(said))
    clip = ClipScore(str(folder / "clip"))
    rows = [
        row(name, pictures, prompts, clip)
        for name, pictures, prompts in (
            ("generated images", made, said),
            ("generated images, captions shuffled", made, mixed),
            ("rendered truths", truth, said),
            ("rendered truths, captions shuffled", truth, mixed),
            ("rendered truths through the autoencoder", restored, said),
        )
    ]
    fidelity = interval(Psnr().score(restored, truth, said).tolist())
    table = "\n".join(
        [
            f"{len(said)} held-out captions, {steps} DPM-Solver++ steps, guidance {guidance}; {date.today()},"
            f" `python -m pipelines.pretrain part=evaluate evaluate.images={images}`. 95 % intervals.",
            "",
            f"| | {' | '.join(VERDICTS)} | CLIP score |",
            f"|---|{'---:|' * 5}",
            *rows,
            "",
            f"The autoencoder's PSNR is {fidelity.mean:.1f} dB [{fidelity.low:.1f}, {fidelity.high:.1f}].",
        ]
    )
    print(table)
    if card:
        save_image(made[:32], folder / "sample.png", nrow=8)
        page = folder / "README.md"
        page.write_text(insert(page.read_text() if page.exists() else f"{BEGIN}\n{END}\n", table))


@torch.no_grad()
def draw(pipe: PixArtSigmaPipeline, captions: Sequence[str], steps: int, guidance: float, seed: int) -> Images:
    return pipe(
        list(captions),
        negative_prompt="",
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=SIZE,
        width=SIZE,
        max_sequence_length=TOKENS,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images.float()  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def restore(pipe: PixArtSigmaPipeline, images: Images) -> Images:
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def row(name: str, images: Images, captions: Sequence[str], clip: ClipScore) -> str:
    verdicts = judge(images, captions)
    found = [interval([float(v) for v in verdicts[key]]) for key in VERDICTS]
    cells = [f"{100 * i.mean:.1f} % [{100 * i.low:.1f}, {100 * i.high:.1f}]" for i in found]
    score = interval(clip.score(images, images, captions).tolist())
    return f"| {name} | {' | '.join(cells)} | {score.mean:.1f} [{score.low:.1f}, {score.high:.1f}] |"


def insert(card: str, table: str) -> str:
    """The card with `table` between its markers."""
    before, rest = card.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
