"""The training tasks of the autoencoder, the text encoder, the CLIP and the oracle.

`fp4dit.pretraining.denoising` trains the transformer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from fp4dit.pretraining.data import NO_ANSWER, Batch


def schedule_rate(
    optimizer: Optimizer, steps: int, warmup: int = 100, decay: float = 0.2
) -> LambdaLR:
    """Return a learning-rate schedule: rise, hold, fall to 0.

    Args:
        optimizer: The optimizer.
        steps: The number of steps of the training.
        warmup: The number of steps over which the rate rises.
        decay: The share of all steps, the last ones, over which the rate falls to 0.
    """

    def compute_factor(step: int) -> float:
        fall = max((steps - step) / (decay * steps), 0.0)
        return min((step + 1) / warmup, 1.0, fall)

    return LambdaLR(optimizer, compute_factor)


def make_adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    steps: int,
    beta: float = 0.98,
    weight_decay: float = 0.01,
    decay: float = 0.4,
) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """Return AdamW and its learning-rate schedule, as `configure_optimizers` returns them.

    Args:
        parameters: The parameters to train.
        lr: The learning rate.
        steps: The number of steps of the training.
        beta: The decay of the second moment.
        weight_decay: The weight decay.
        decay: The share of all steps, the last ones, over which the rate falls to 0.
    """
    optimizer = AdamW(parameters, lr, betas=(0.9, beta), weight_decay=weight_decay)
    schedule = schedule_rate(optimizer, steps, decay=decay)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def tokenize_captions(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str]):
    """Return token ids and mask, padded to one length as the pipeline pads them."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")


class AutoencoderTask(L.LightningModule):
    """Train the autoencoder on squared error, absolute error and a little KL divergence.

    Args:
        model: The autoencoder; parameters that require no gradient stay as they are.
        lr: The learning rate of AdamW.
        steps: The number of batches, for the learning-rate schedule.
        kl: The weight of the KL divergence of the latents.
        absolute: The weight of the absolute error.

    Example:
        >>> model = build_autoencoder(ShapesWorld(), widths=(16, 32, 64), latents=4)
        >>> task = AutoencoderTask(model, lr=1e-3, steps=1000)
        >>> lightning.Trainer(max_steps=1000).fit(task, SceneData(ShapesWorld(), batch=32))
    """

    def __init__(
        self, model: AutoencoderKL, lr: float, steps: int, kl: float = 1e-6, absolute: float = 0.1
    ) -> None:
        super().__init__()
        self.model, self.lr, self.steps, self.kl, self.absolute = model, lr, steps, kl, absolute
        bias: Tensor = model.quant_conv.bias  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
        latents: int = model.config.latent_channels  # pyright: ignore[reportAttributeAccessIssue]
        nn.init.constant_(bias[latents:], -6.0)  # begin with little noise

    def training_step(self, batch: Batch, _: int) -> Tensor:
        image = batch.pictures
        posterior = self.model.encode(image).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        restored = self.model.decode(posterior.sample()).sample  # pyright: ignore[reportAttributeAccessIssue]
        error = F.mse_loss(restored.float(), image)
        self.log("psnr", 10 * torch.log10(4 / error.detach()), prog_bar=True)
        # A share of absolute error keeps flat areas flat and edges sharp.
        return (
            error
            + self.absolute * F.l1_loss(restored.float(), image)
            + self.kl * posterior.kl().mean()
        )

    def configure_optimizers(self):
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return make_adamw(trainable, self.lr, self.steps, beta=0.99, weight_decay=0.0, decay=0.5)


def answer_loss(
    logits: Float[Tensor, "*n c"], answers: Int[Tensor, "*n q"], choices: Sequence[int]
) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy over several questions.

    Args:
        logits: The logits of all questions side by side.
        answers: One label per question; NO_ANSWER is not counted.
        choices: The number of choices of each question.
    """
    answers = answers.flatten(0, -2)
    losses = []
    for question, part in enumerate(logits.float().flatten(0, -2).split(list(choices), -1)):
        losses.append(F.cross_entropy(part, answers[:, question], ignore_index=NO_ANSWER))
    return torch.stack(losses).mean()


class TextTask(L.LightningModule):
    """Train the text encoder, so that each word knows the object that it belongs to.

    A caption whose attributes or objects are exchanged then differs in the state of every word. The
    transformer reads the states of the frozen encoder.

    Args:
        text_encoder: The text encoder.
        tokenizer: The tokenizer of the captions.
        choices: The number of choices of each question, as in `World.word_choices`.
        lr: The learning rate of AdamW.
        steps: The number of batches, for the learning-rate schedule.

    Example:
        >>> world = ShapesWorld()
        >>> tokenizer = build_tokenizer(world)
        >>> text_encoder = build_text_encoder(len(tokenizer))
        >>> task = TextTask(text_encoder, tokenizer, world.word_choices, lr=1e-3, steps=1000)
    """

    def __init__(
        self,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        choices: Sequence[int],
        lr: float,
        steps: int,
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer, self.lr, self.steps = text_encoder, tokenizer, lr, steps
        self.choices = choices
        self.head = nn.Linear(text_encoder.config.d_model, sum(choices))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        states = self.text_encoder(
            **tokenize_captions(self.tokenizer, batch.captions).to(self.device)
        ).last_hidden_state
        loss = answer_loss(self.head(states), batch.words, self.choices)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return make_adamw(self.parameters(), self.lr, self.steps)


def contrastive_loss(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], scale: Tensor
) -> Float[Tensor, ""]:
    """Compute CLIP's symmetric cross-entropy (arXiv:2103.00020)."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ClipTask(L.LightningModule):
    """Train a small CLIP by contrast, and by a linear head that reads the scene from each feature.

    The head is trained too because contrast alone teaches slowly which object is where.

    Args:
        clip: The CLIP.
        tokenizer: The tokenizer of the captions.
        choices: The number of choices of each question, as in `World.slot_choices`.
        lr: The learning rate of AdamW.
        steps: The number of batches, for the learning-rate schedule.

    Example:
        >>> world = ShapesWorld()
        >>> tokenizer = build_tokenizer(world)
        >>> clip = build_clip(world, len(tokenizer))
        >>> task = ClipTask(clip, tokenizer, world.slot_choices, lr=1e-3, steps=1000)
    """

    def __init__(
        self,
        clip: CLIP,
        tokenizer: PreTrainedTokenizerBase,
        choices: Sequence[int],
        lr: float,
        steps: int,
    ) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.lr, self.steps = clip, tokenizer, lr, steps
        self.choices = choices
        width: int = clip.text_projection.shape[1]  # pyright: ignore[reportIndexIssue, reportOptionalMemberAccess, reportAssignmentType]
        self.head = nn.Linear(width, sum(choices))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        tokens = tokenize_captions(self.tokenizer, batch.captions).to(self.device)
        image, text = (
            self.clip.encode_image(batch.pictures),
            self.clip.encode_text(tokens["input_ids"]),
        )
        contrast = contrastive_loss(image, text, self.clip.logit_scale.exp().clamp(max=100))
        slots = answer_loss(self.head(image), batch.slots, self.choices)
        slots = slots + answer_loss(self.head(text), batch.slots, self.choices)
        self.log_dict({"contrast": contrast, "slots": slots}, prog_bar=True)
        return contrast + slots

    def configure_optimizers(self):
        return make_adamw(self.parameters(), self.lr, self.steps)


class OracleTask(L.LightningModule):
    """Train the network that judges pictures, on pictures distorted as a model may distort them.

    Half of all pictures go through the autoencoder, with noise added to the latents. Then colours
    are shifted, and some pictures are blurred or get noise.

    Args:
        reader: The network, which maps pictures in [-1, 1] to the logits of all questions.
        vae: The frozen autoencoder.
        choices: The number of choices of each question, as in `World.slot_choices`.
        lr: The learning rate of AdamW.
        steps: The number of batches, for the learning-rate schedule.
        spread: The largest standard deviation of the noise in the latents, in units of theirs.

    Example:
        >>> world = EmojiWorld(artwork="package")
        >>> task = OracleTask(world.build_reader(), vae, world.slot_choices, lr=1e-3, steps=1000)
    """

    def __init__(
        self,
        reader: nn.Module,
        vae: AutoencoderKL,
        choices: Sequence[int],
        lr: float,
        steps: int,
        spread: float = 0.15,
    ) -> None:
        super().__init__()
        self.reader, self.lr, self.steps, self.choices = reader, lr, steps, choices
        self.vae, self.spread = vae.requires_grad_(False), spread

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = answer_loss(self.reader(self.distort(batch.pictures)), batch.slots, self.choices)
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def distort(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Return pictures as a model might draw them; the first half is encoded and decoded."""
        half = pictures[: len(pictures) // 2]
        latents = self.vae.encode(half).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
        strength = self.spread * torch.rand(len(half), 1, 1, 1) / self.vae.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
        latents = latents + strength * torch.randn_like(latents)
        restored = self.vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
        images = torch.cat([restored, pictures[len(half) :]])
        n = len(images)
        images = images * (1 + 0.05 * torch.randn(n, 3, 1, 1)) + 0.05 * torch.randn(n, 3, 1, 1)
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        images = torch.lerp(
            images, blurred, torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)
        )
        noise = 0.1 * torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)
        return (images + noise * torch.randn_like(images)).clamp(-1, 1)

    def configure_optimizers(self):
        return make_adamw(self.reader.parameters(), self.lr, self.steps)
