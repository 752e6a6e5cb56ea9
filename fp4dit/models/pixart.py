"""PixArt-alpha and PixArt-Sigma, from any folder or hub id that diffusers loads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, PixArtAlphaPipeline, PixArtSigmaPipeline
from jaxtyping import Float
from torch import Tensor, int64

from fp4dit.calls import Call
from fp4dit.embeddings import MAKE, Embeddings, Texts
from fp4dit.errors import UserError
from fp4dit.models.checkpoint import Adapter, Checkpoint
from fp4dit.stream import Rows, State, Unit


@dataclass(frozen=True)
class PixArt(Checkpoint):
    """Where a PixArt is and how to load it. `tokens` is the length that prompts are padded to.

    With a file of `embeddings` it draws the texts in there, and its text encoder is not loaded.
    """

    tokens: int = 300
    embeddings: str | None = field(default=None, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (PixArtAlphaPipeline, PixArtSigmaPipeline)

    def around(self, dit: ModelMixin, pipe: DiffusionPipeline | None = None) -> "PixArtPipeline":
        return PixArtPipeline(dit, self.tokens, pipe, Embeddings(self.embeddings) if self.embeddings else None)

    def open(self, **parts: Any) -> DiffusionPipeline:
        """Raises UserError, too, if the pipeline has no text encoder, and there are no embeddings."""
        if self.embeddings:
            return super().open(**{"text_encoder": None, "tokenizer": None, **parts})
        pipe = super().open(**parts)
        if pipe.components["text_encoder"] is None:
            raise UserError(f"{self.path} has no text encoder: give model.embeddings=/a/file.safetensors, and {MAKE}")
        return pipe

    def check(self, prompts: Sequence[str]) -> None:
        super().check(prompts)
        if self.embeddings:
            Embeddings(self.embeddings).check(prompts)

    def check_text_encoder(self) -> None:
        """Raises UserError, too, if embeddings take its place."""
        if self.embeddings:
            raise UserError(
                "with model.embeddings no text encoder is loaded that could be quantized: use text_encoder=none, or do "
                "without the embeddings"
            )
        super().check_text_encoder()


class PixArtPipeline(Adapter):
    """A PixArt as a chain of units: its embeddings, its blocks, its output layer."""

    def __init__(
        self,
        dit: ModelMixin,
        tokens: int,
        pipe: DiffusionPipeline | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        super().__init__(dit, pipe)
        self.tokens, self.embeddings = tokens, embeddings
        self.options = {"max_sequence_length": tokens, "use_resolution_binning": False, "clean_caption": False}

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        if self.embeddings is None:
            return super().sample(prompts, seeds, steps, guidance)
        options = dict(self.options)
        for kind, texts in {"": prompts, "negative_": [""] * len(prompts)}.items():
            embeds, mask = self.embeddings.of(texts)
            options |= {f"{kind}prompt_embeds": embeds, f"{kind}prompt_attention_mask": mask.to(self.device)}
        return self.draw(None, seeds, steps, guidance, negative_prompt=None, **options)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Texts:
        """What the text encoder makes of them."""
        alone = {"do_classifier_free_guidance": False, "clean_caption": False}
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.tokens, **alone
        )
        return embeds, mask

    def blank(self, n: int) -> Call:
        config = self.dit.config
        sized = config.sample_size == 128  # by which diffusers knows the models that are told the image's size
        given = {
            "encoder_hidden_states": self.empty(n, self.tokens, config.caption_channels),
            "encoder_attention_mask": self.empty(n, self.tokens, dtype=int64),
            "timestep": self.empty(n, dtype=int64),
            "added_cond_kwargs": {
                "resolution": self.empty(n, 2) if sized else None,
                "aspect_ratio": self.empty(n, 1) if sized else None,
            },
            "return_dict": False,
        }
        return Call((self.latent(n),), given)

    def begin(self, call: Call) -> State:
        given = call.named(self.dit)
        latent, mask = given["hidden_states"], given["encoder_attention_mask"]
        conditions = {k: v for k, v in (given["added_cond_kwargs"] or {}).items() if v is not None}
        state = {
            "latent": latent,
            "timestep": given["timestep"].expand(len(latent)),
            "text": given["encoder_hidden_states"],
            "bias": ((1 - mask.to(latent.dtype)) * -10000.0).unsqueeze(1),
        }
        return state | conditions

    def units(self) -> list[Unit]:
        dit, dtype = self.dit, self.dit.dtype

        def embed_time(s: Rows) -> Call:
            conditions = {name: s.get(name) for name in ("resolution", "aspect_ratio")}
            return Call((s["timestep"], conditions), {"batch_size": len(s["timestep"]), "hidden_dtype": dtype})

        block_reads = ("hidden", "text", "bias", "modulation")

        def block(s: Rows) -> Call:
            given = {
                "encoder_hidden_states": s["text"],
                "encoder_attention_mask": s["bias"],
                "timestep": s["modulation"],
            }
            return Call((s["hidden"],), given)

        def project(s: Rows) -> Call:
            shift, scale = (dit.scale_shift_table[None] + s["time"][:, None]).chunk(2, dim=1)
            return Call((dit.norm_out(s["hidden"]) * (1 + scale) + shift,), {})

        return [
            Unit("pos_embed", ("latent",), lambda s: Call((s["latent"],), {}), ("hidden",)),
            Unit("adaln_single", ("timestep", "resolution", "aspect_ratio"), embed_time, ("modulation", "time")),
            Unit("caption_projection", ("text",), lambda s: Call((s["text"],), {}), ("text",)),
            *(
                Unit(f"transformer_blocks.{i}", block_reads, block, ("hidden",))
                for i in range(len(dit.transformer_blocks))
            ),
            Unit("proj_out", ("hidden", "time"), project, ("hidden",)),
        ]
