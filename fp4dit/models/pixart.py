"""PixArt-alpha and PixArt-Sigma, from any folder or hub id that diffusers loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from jaxtyping import Float
from torch import Tensor

from fp4dit.calls import Call
from fp4dit.models.checkpoint import Adapter, Checkpoint
from fp4dit.stream import Rows, State, Unit


@dataclass(frozen=True)
class PixArt(Checkpoint):
    """Where a PixArt is and how to load it. `tokens` is the length that prompts are padded to."""

    tokens: int = 300

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (PixArtAlphaPipeline, PixArtSigmaPipeline)

    def load(self) -> "PixArtPipeline":
        return PixArtPipeline(self.open(), self.tokens)


class PixArtPipeline(Adapter):
    """A PixArt as a chain of units: its embeddings, its blocks, its output layer."""

    def __init__(self, pipe: DiffusionPipeline, tokens: int) -> None:
        super().__init__(pipe)
        self.tokens = tokens

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        options = {"max_sequence_length": self.tokens, "use_resolution_binning": False, "clean_caption": False}
        return self.draw(prompts, seeds, steps, guidance, **options)

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
