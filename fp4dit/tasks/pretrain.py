"""Train the shipped model: its autoencoder, its text encoder, its transformer, and the small CLIP that scores it."""

from collections.abc import Iterable, Sequence

import lightning as L
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from jaxtyping import Float, Int
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from fp4dit.errors import UserError
from fp4dit.models.shapes.data import ATTRIBUTES, SLOTS, Batch
from fp4dit.training.layer import resume_

OPTIMIZERS = 2  # of a DenoisingTask; Lightning counts the steps of each


def trapezoid(optimizer: Optimizer, steps: int, warmup: int = 100, decay: float = 0.2) -> LambdaLR:
    """Rise over `warmup` steps, hold, fall linearly to 0 over the last `decay` of all steps."""
    return LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.0, max((steps - i) / (decay * steps), 0.0)))


class AutoencoderTask(L.LightningModule):
    """Learn to compress pictures. The latents' spread is measured at the end, for `scaling_factor`."""

    def __init__(self, model: AutoencoderKL, lr: float, steps: int, kl: float = 1e-6, absolute: float = 0.1) -> None:
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
        return error + self.absolute * F.l1_loss(restored.float(), image) + self.kl * posterior.kl().mean()

    def configure_optimizers(self):
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = AdamW(learnt, self.lr, betas=(0.9, 0.99), weight_decay=0)
        return [optimizer], [{"scheduler": trapezoid(optimizer, self.steps, decay=0.5), "interval": "step"}]


def told(logits: Float[Tensor, "*n c"], answers: Int[Tensor, "*n q"], choices: Sequence[int]) -> Float[Tensor, ""]:
    """Mean cross-entropy over questions with so many choices each, their logits side by side; -100 is no answer."""
    parts = logits.float().flatten(0, -2).split(list(choices), -1)
    answers = answers.flatten(0, -2)
    return torch.stack([F.cross_entropy(part, answers[:, i]) for i, part in enumerate(parts)]).mean()


class TextTask(L.LightningModule):
    """The text encoder that the transformer will read, frozen: each word must know the object it belongs to.

    With that, a caption whose colours or objects are exchanged reads differently at every word.
    """

    def __init__(self, text_encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, lr: float, steps: int) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer, self.lr, self.steps = text_encoder, tokenizer, lr, steps
        self.head = nn.Linear(text_encoder.config.d_model, sum(ATTRIBUTES))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        states = self.text_encoder(**tokens_of(self.tokenizer, batch.captions).to(self.device)).last_hidden_state
        loss = told(self.head(states), batch.words, ATTRIBUTES)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), self.lr, betas=(0.9, 0.98), weight_decay=0.01)
        return [optimizer], [{"scheduler": trapezoid(optimizer, self.steps, decay=0.4), "interval": "step"}]


def contrastive(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], scale: Tensor) -> Float[Tensor, ""]:
    """CLIP's symmetric cross-entropy (arXiv:2103.00020)."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ClipTask(L.LightningModule):
    """A small CLIP. Either feature must also tell what is where, for contrast alone is slow to teach that."""

    def __init__(self, clip: CLIP, tokenizer: PreTrainedTokenizerBase, lr: float, steps: int) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.lr, self.steps = clip, tokenizer, lr, steps
        width: int = clip.text_projection.shape[1]  # pyright: ignore[reportIndexIssue, reportOptionalMemberAccess, reportAssignmentType]
        self.head = nn.Linear(width, sum(SLOTS))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        tokens = tokens_of(self.tokenizer, batch.captions).to(self.device)
        image, text = self.clip.encode_image(batch.pictures), self.clip.encode_text(tokens["input_ids"])
        contrast = contrastive(image, text, self.clip.logit_scale.exp().clamp(max=100))
        slots = told(self.head(image), batch.slots, SLOTS) + told(self.head(text), batch.slots, SLOTS)
        self.log_dict({"contrast": contrast, "slots": slots}, prog_bar=True)
        return contrast + slots

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), self.lr, betas=(0.9, 0.98), weight_decay=0.01)
        return [optimizer], [{"scheduler": trapezoid(optimizer, self.steps, decay=0.4), "interval": "step"}]


class DenoisingTask(L.LightningModule):
    """Learn v = sqrt(a) noise - sqrt(1 - a) x at every noise level (arXiv:2202.00512), captions dropped at times.

    Hidden matrices learn with Muon, which needs about half of Adam's samples here; all else with AdamW.
    Every picture is used at `levels` noise levels, since encoding it costs a third of a training pass.
    """

    automatic_optimization = False  # pyright: ignore[reportAssignmentType]
    signal: Tensor

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: DPMSolverMultistepScheduler,
        steps: int,
        lr: float = 1e-3,
        muon_lr: float = 2e-3,
        levels: int = 2,
        drop: float = 0.1,
        decay: float = 0.999,
        warmup: int = 100,
    ) -> None:
        super().__init__()
        self.transformer, self.steps, self.warmup = transformer, steps, warmup
        self.lr, self.muon_lr = lr, muon_lr
        self.average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
        self.vae, self.text_encoder = vae.requires_grad_(False), text_encoder.requires_grad_(False)
        self.tokenizer, self.levels, self.drop = tokenizer, levels, drop
        self.register_buffer("signal", scheduler.alphas_cumprod.clone(), persistent=False)

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        captions = ["" if torch.rand(()) < self.drop else c for c in batch.captions]
        tokens = tokens_of(self.tokenizer, captions).to(self.device)
        latents = self.vae.encode(batch.pictures).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
        states = self.text_encoder(**tokens).last_hidden_state
        repeat = lambda x: x.float().repeat(self.levels, *[1] * (x.ndim - 1))
        scale: float = self.vae.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
        return repeat(latents * scale), repeat(states), repeat(tokens["attention_mask"])

    def on_train_start(self) -> None:
        resume_(self.transformer, self.global_step // OPTIMIZERS)

    def loss(self, net: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Mean squared error of v."""
        latents, states, mask = self.encode(batch)
        # Stratified over the whole schedule: each batch sees all noise levels.
        n = len(latents)
        timestep = ((torch.randperm(n) + torch.rand(n)) / n * len(self.signal)).long().to(self.device)
        signal, noise = self.signal[timestep].view(-1, 1, 1, 1), torch.randn_like(latents)
        answer = net(
            signal.sqrt() * latents + (1 - signal).sqrt() * noise,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return F.mse_loss(answer.chunk(2, 1)[0].float(), signal.sqrt() * noise - (1 - signal).sqrt() * latents)

    def training_step(self, batch: Batch, _: int) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU twice as fast as flash at 64 tokens
            loss = self.loss(self.transformer, batch)
            for optimizer in self.optimizers():  # pyright: ignore[reportGeneralTypeIssues]
                optimizer.zero_grad()
            self.manual_backward(loss)
        if not nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0).isfinite():
            raise UserError(
                f"batch {self.global_step // OPTIMIZERS} has no finite gradient: give smaller rates, lr and muon_lr. "
                "What was kept last is of a batch before it"
            )
        both = zip(self.optimizers(), self.lr_schedulers(), strict=True)  # pyright: ignore[reportArgumentType]
        for optimizer, schedule in both:
            optimizer.step()
            schedule.step()
        self.average.update_parameters(self.transformer)
        self.log("loss", loss, prog_bar=True)

    def test_step(self, batch: Batch) -> None:
        """The loss of the averaged weights."""
        with sdpa_kernel(SDPBackend.MATH):
            self.log("loss", self.loss(self.average.module, batch), batch_size=len(batch.captions))

    def configure_optimizers(self):
        hidden, rest = [], []
        for name, p in self.transformer.named_parameters():
            (hidden if "transformer_blocks" in name and name.endswith("weight") and p.ndim == 2 else rest).append(p)
        optimizers = [
            Muon(hidden, self.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            AdamW(rest, self.lr, betas=(0.9, 0.99), weight_decay=0),
        ]
        return optimizers, [trapezoid(o, self.steps, self.warmup) for o in optimizers]


def tokens_of(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str]):
    """Padded to one length, as the pipeline does it."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
