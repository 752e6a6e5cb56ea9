"""Adapter of PixArt-alpha (arXiv:2310.00426) and PixArt-Sigma (arXiv:2403.04692)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, PixArtAlphaPipeline, PixArtSigmaPipeline
from jaxtyping import Float
from torch import Tensor, int64

from fp4dit.data.embeddings import INSTRUCTIONS, EncodedPrompts, PromptEmbeddings
from fp4dit.models.adapter import TransformerAdapter
from fp4dit.models.blocks import (
    ActivationState,
    ReadOnlyState,
    Unit,
    make_simple_unit,
    read_noise_channels,
)
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError

# Added to the attention scores of padding tokens, as diffusers does.
PADDING_BIAS = -10000.0


@dataclass(frozen=True)
class PixArt(PretrainedSource):
    """PixArt pipeline in a folder or on the Hugging Face hub.

    Args:
        tokens: The number of tokens that prompts are padded to.
        embeddings: A file of prompt embeddings, which replaces the text encoder. The pipeline can
            then draw the prompts of the file only.

    Example:
        >>> source = PixArt("PixArt-alpha/PixArt-XL-2-1024-MS", dtype="float16", tokens=120)
        >>> images = source.load().sample(["a red square"], seeds=[0], steps=20, guidance=4.5)
    """

    tokens: int = 300
    embeddings: str | None = field(default=None, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
    )

    @property
    def draws_from_embeddings(self) -> bool:
        return bool(self.embeddings)

    def make_adapter(
        self, transformer: ModelMixin, pipe: DiffusionPipeline | None = None
    ) -> "PixArtAdapter":
        embeddings = PromptEmbeddings(self.embeddings) if self.embeddings else None
        return PixArtAdapter(transformer, self.tokens, pipe, embeddings)

    def load_pipeline(self, **components: Any) -> DiffusionPipeline:
        """Load diffusers' pipeline, without its text encoder if there are embeddings.

        Raises:
            UserError: if there is neither a text encoder nor a file of embeddings, or as the base
                class does.
        """
        if self.embeddings:
            return super().load_pipeline(**{"text_encoder": None, "tokenizer": None, **components})
        pipe = super().load_pipeline(**components)
        if pipe.components["text_encoder"] is None:
            raise UserError(
                f"{self.path} has no text encoder: give model.embeddings=/a/file.safetensors, and "
                f"{INSTRUCTIONS}"
            )
        return pipe

    def check(self, prompts: Sequence[str]) -> None:
        super().check(prompts)
        if self.embeddings:
            PromptEmbeddings(self.embeddings).check_prompts(prompts)

    def check_text_encoder(self) -> None:
        if self.embeddings:
            raise UserError(
                "with model.embeddings no text encoder is loaded that could be quantized: use "
                "text_encoder=none, or do not use embeddings"
            )
        super().check_text_encoder()


class PixArtAdapter(TransformerAdapter):
    """Adapter that splits a PixArt into its embeddings, its blocks and its output layer.

    Args:
        transformer: The transformer.
        tokens: The number of tokens that prompts are padded to.
        pipe: The pipeline around the transformer.
        embeddings: The prompt embeddings, which replace the text encoder.

    Example:
        >>> adapter = PixArtAdapter(transformer, tokens=300)
        >>> adapter.initial_state(adapter.meta_call(4))["bias"].shape
        torch.Size([4, 1, 300])
    """

    def __init__(
        self,
        transformer: ModelMixin,
        tokens: int,
        pipe: DiffusionPipeline | None = None,
        embeddings: PromptEmbeddings | None = None,
    ) -> None:
        super().__init__(transformer, pipe)
        self.tokens, self.embeddings = tokens, embeddings
        self.options: Mapping[str, Any] = {
            "max_sequence_length": tokens,
            "use_resolution_binning": False,
            "clean_caption": False,
        }

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        if self.embeddings is None:
            return super().sample(prompts, seeds, steps, guidance)
        options = dict(self.options)
        # The empty prompt is the negative one, from which guidance leads away.
        for prefix, texts in {"": prompts, "negative_": [""] * len(prompts)}.items():
            embeds, mask = self.embeddings.select(texts)
            options[f"{prefix}prompt_embeds"] = embeds
            options[f"{prefix}prompt_attention_mask"] = mask.to(self.device)
        return self.run_pipeline(None, seeds, steps, guidance, negative_prompt=None, **options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Return the outputs of the text encoder, and the mask that is 0 at padding tokens."""
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts),
            device=self.device,
            max_sequence_length=self.tokens,
            do_classifier_free_guidance=False,
            clean_caption=False,
        )
        return embeds, mask

    def meta_call(self, n: int) -> Call:
        config = self.transformer.config
        # Diffusers recognizes the models that are conditioned on the image's size in this way.
        has_size_condition = config.sample_size == 128
        kwargs = {
            "encoder_hidden_states": self.make_meta_tensor(n, self.tokens, config.caption_channels),
            "encoder_attention_mask": self.make_meta_tensor(n, self.tokens, dtype=int64),
            "timestep": self.make_meta_tensor(n, dtype=int64),
            "added_cond_kwargs": {
                "resolution": self.make_meta_tensor(n, 2) if has_size_condition else None,
                "aspect_ratio": self.make_meta_tensor(n, 1) if has_size_condition else None,
            },
            "return_dict": False,
        }
        return Call((self.make_meta_latent(n),), kwargs)

    def initial_state(self, call: Call) -> ActivationState:
        arguments = call.bind_arguments(self.transformer)
        latent, mask = arguments["hidden_states"], arguments["encoder_attention_mask"]
        state = {
            "latent": latent,
            "timestep": arguments["timestep"].expand(len(latent)),
            "text": arguments["encoder_hidden_states"],
            "bias": ((1 - mask.to(latent.dtype)) * PADDING_BIAS).unsqueeze(1),
        }
        for name, value in (arguments["added_cond_kwargs"] or {}).items():
            if value is not None:
                state[name] = value
        return state

    def units(self) -> list[Unit]:
        transformer, dtype = self.transformer, self.transformer.dtype

        def make_time_call(state: ReadOnlyState) -> Call:
            conditions = {name: state.get(name) for name in ("resolution", "aspect_ratio")}
            kwargs = {"batch_size": len(state["timestep"]), "hidden_dtype": dtype}
            return Call((state["timestep"], conditions), kwargs)

        def make_output_call(state: ReadOnlyState) -> Call:
            table = transformer.scale_shift_table[None]
            shift, scale = (table + state["time"][:, None]).chunk(2, dim=1)
            return Call((transformer.norm_out(state["hidden"]) * (1 + scale) + shift,), {})

        time_inputs = ("timestep", "resolution", "aspect_ratio")
        block_inputs = ("hidden", "text", "bias", "modulation")
        return [
            make_simple_unit("pos_embed", ("latent",), ("hidden",)),
            Unit("adaln_single", time_inputs, make_time_call, ("modulation", "time")),
            make_simple_unit("caption_projection", ("text",), ("text",)),
            *(
                Unit(f"transformer_blocks.{i}", block_inputs, make_block_call, ("hidden",))
                for i in range(len(transformer.transformer_blocks))
            ),
            Unit("proj_out", ("hidden", "time"), make_output_call, ("hidden",)),
        ]

    def read_prediction(self, state: ReadOnlyState) -> Float[Tensor, "n noise"]:
        return read_noise_channels(state["hidden"], self.transformer)


def make_block_call(state: ReadOnlyState) -> Call:
    """Make the call of a transformer block."""
    kwargs = {
        "encoder_hidden_states": state["text"],
        "encoder_attention_mask": state["bias"],
        "timestep": state["modulation"],
    }
    return Call((state["hidden"],), kwargs)
