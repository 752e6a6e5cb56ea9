"""The training task of the transformer: v-prediction with Muon and AdamW."""

import lightning as L
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Muon
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from fp4dit.lowbit_training.linear import resume_rng_
from fp4dit.pretraining.data import Batch
from fp4dit.pretraining.tasks import schedule_rate, tokenize_captions
from fp4dit.utils.errors import UserError

OPTIMIZERS = 2  # optimizers of a DenoisingTask; Lightning counts the steps of each


class DenoisingTask(L.LightningModule):
    """Train the transformer to predict v = sqrt(a) noise - sqrt(1 - a) x (arXiv:2202.00512).

    Hidden matrices learn with Muon, which needs about half of Adam's samples here, and all other
    parameters with AdamW.

    Args:
        transformer: The model to train.
        vae: The frozen autoencoder.
        text_encoder: The frozen text encoder.
        tokenizer: The tokenizer of the captions.
        scheduler: The noise schedule.
        steps: The number of batches, for the learning-rate schedule.
        lr: The learning rate of AdamW.
        muon_lr: The learning rate of Muon.
        levels: The number of noise levels at which each picture is used. Encoding a picture costs a
            third of a training pass.
        drop: The share of captions that are left out, for classifier-free guidance.
        decay: The decay of the running average of the weights.
        warmup: The number of steps over which the learning rates rise.

    Raises:
        UserError: in a step whose gradient is not finite.

    Example:
        >>> task = DenoisingTask(
        ...     transformer, vae, text_encoder, tokenizer, build_scheduler(), steps=1000
        ... )
        >>> lightning.Trainer(max_steps=2000).fit(task, SceneData(ShapesWorld(), batch=32))
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
        self.average = AveragedModel(
            transformer, multi_avg_fn=get_ema_multi_avg_fn(decay)
        ).requires_grad_(False)
        self.vae, self.text_encoder = vae.requires_grad_(False), text_encoder.requires_grad_(False)
        self.tokenizer, self.levels, self.drop = tokenizer, levels, drop
        self.register_buffer("signal", scheduler.alphas_cumprod.clone(), persistent=False)

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents, text states and text mask, each repeated for every noise level."""
        captions = ["" if torch.rand(()) < self.drop else c for c in batch.captions]
        tokens = tokenize_captions(self.tokenizer, captions).to(self.device)
        latents = self.vae.encode(batch.pictures).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
        states = self.text_encoder(**tokens).last_hidden_state
        scale: float = self.vae.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
        mask = tokens["attention_mask"]
        return self.repeat(latents * scale), self.repeat(states), self.repeat(mask)

    def repeat(self, x: Tensor) -> Tensor:
        """Repeat a batch for every noise level."""
        return x.float().repeat(self.levels, *[1] * (x.ndim - 1))

    def on_train_start(self) -> None:
        resume_rng_(self.transformer, self.global_step // OPTIMIZERS)

    def loss(self, net: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Compute the mean squared error of v."""
        latents, states, mask = self.encode(batch)
        # Stratified over the whole schedule: each batch sees all noise levels.
        n = len(latents)
        timestep = (
            ((torch.randperm(n) + torch.rand(n)) / n * len(self.signal)).long().to(self.device)
        )
        signal, noise = self.signal[timestep].view(-1, 1, 1, 1), torch.randn_like(latents)
        answer = net(
            signal.sqrt() * latents + (1 - signal).sqrt() * noise,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return F.mse_loss(
            answer.chunk(2, 1)[0].float(), signal.sqrt() * noise - (1 - signal).sqrt() * latents
        )

    def training_step(self, batch: Batch, _: int) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU twice as fast as flash at 64 tokens
            loss = self.loss(self.transformer, batch)
            for optimizer in self.optimizers():  # pyright: ignore[reportGeneralTypeIssues]
                optimizer.zero_grad()
            self.manual_backward(loss)
        if not nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0).isfinite():
            raise UserError(
                f"batch {self.global_step // OPTIMIZERS} has no finite gradient: give smaller "
                "rates, lr and muon_lr. The last checkpoint is of a batch before it"
            )
        both = zip(self.optimizers(), self.lr_schedulers(), strict=True)  # pyright: ignore[reportArgumentType]
        for optimizer, schedule in both:
            optimizer.step()
            schedule.step()
        self.average.update_parameters(self.transformer)
        self.log("loss", loss, prog_bar=True)

    def test_step(self, batch: Batch) -> None:
        """Log the loss of the averaged weights."""
        with sdpa_kernel(SDPBackend.MATH):
            self.log("loss", self.loss(self.average.module, batch), batch_size=len(batch.captions))

    def configure_optimizers(self):
        hidden, rest = [], []
        for name, p in self.transformer.named_parameters():
            in_block = "transformer_blocks" in name
            if in_block and name.endswith("weight") and p.ndim == 2:
                hidden.append(p)
            else:
                rest.append(p)
        optimizers = [
            Muon(hidden, self.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            AdamW(rest, self.lr, betas=(0.9, 0.99), weight_decay=0),
        ]
        return optimizers, [schedule_rate(o, self.steps, self.warmup) for o in optimizers]
