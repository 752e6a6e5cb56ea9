"""PixArt-alpha and PixArt-Sigma, from any folder or hub id that diffusers loads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calls import Call
from fp4dit.errors import UserError
from fp4dit.resources import locate
from fp4dit.stream import State, Unit

Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class PixArt:
    """Where a PixArt is and how to load it. `tokens` is the length that prompts are padded to."""

    path: str
    dtype: str = "float32"
    tokens: int = 300

    def load(self) -> "PixArtPipeline":
        pipe = DiffusionPipeline.from_pretrained(self.folder(), dtype=getattr(torch, self.dtype))
        if not isinstance(getattr(pipe, "transformer", None), PixArtTransformer2DModel):
            raise UserError(f"{self.path} holds a {type(pipe).__name__}; this adapter is for PixArt pipelines")
        return PixArtPipeline(pipe, self.tokens)

    def skeleton(self) -> nn.Module:
        """The transformer without its weights, to check rules on before anything is loaded."""
        config: dict[str, Any] = PixArtTransformer2DModel.load_config(  # pyright: ignore[reportAssignmentType]
            self.folder(), subfolder="transformer"
        )
        with init_empty_weights():
            return PixArtTransformer2DModel.from_config(config)  # pyright: ignore[reportReturnType]

    def folder(self) -> str:
        """Raises UserError if this is a path and no PixArt pipeline is there; a hub id is not looked up."""
        folder = locate(self.path)
        if not Path(folder).is_dir():
            if folder != self.path or folder.startswith((".", "/", "~")):
                raise UserError(f"there is no folder {self.path}: give a diffusers pipeline's folder or its hub id")
            return folder
        index = Path(folder) / "model_index.json"
        if not index.is_file():
            raise UserError(f"{self.path} is not a diffusers pipeline: the folder has no model_index.json")
        found = json.loads(index.read_text())
        if PixArtTransformer2DModel.__name__ not in found.get("transformer", ()):
            raise UserError(f"{self.path} holds a {found.get('_class_name')}; this adapter is for PixArt pipelines")
        return folder


class PixArtPipeline:
    """A diffusers pipeline seen as a chain of units."""

    def __init__(self, pipe: DiffusionPipeline, tokens: int) -> None:
        self.pipe, self.tokens, self.device = pipe, tokens, torch.device("cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.dit: PixArtTransformer2DModel = pipe.transformer.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> None:
        self.pipe.to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        return self.pipe(  # pyright: ignore[reportCallIssue]
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_sequence_length=self.tokens,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="pt",
        ).images.float()

    def begin(self, call: Call) -> State:
        latent, given = call.args[0], call.kwargs
        conditions = {k: v for k, v in (given["added_cond_kwargs"] or {}).items() if v is not None}
        mask = given["encoder_attention_mask"]
        state = {
            "latent": latent,
            "timestep": given["timestep"].expand(len(latent)),
            "text": given["encoder_hidden_states"],
            "bias": ((1 - mask.to(latent.dtype)) * -10000.0).unsqueeze(1),
        }
        return state | conditions

    def units(self) -> list[Unit]:
        dit, dtype = self.dit, self.dit.dtype

        def embed_time(s: Columns) -> Call:
            conditions = {name: s.get(name) for name in ("resolution", "aspect_ratio")}
            return Call((s["timestep"], conditions), {"batch_size": len(s["timestep"]), "hidden_dtype": dtype})

        def block(s: Columns) -> Call:
            given = {
                "encoder_hidden_states": s["text"],
                "encoder_attention_mask": s["bias"],
                "timestep": s["modulation"],
            }
            return Call((s["hidden"],), given)

        def project(s: Columns) -> Call:
            shift, scale = (dit.scale_shift_table[None] + s["time"][:, None]).chunk(2, dim=1)
            return Call((dit.norm_out(s["hidden"]) * (1 + scale) + shift,), {})

        return [
            Unit("pos_embed", lambda s: Call((s["latent"],), {}), ("hidden",)),
            Unit("adaln_single", embed_time, ("modulation", "time")),
            Unit("caption_projection", lambda s: Call((s["text"],), {}), ("text",)),
            *(Unit(f"transformer_blocks.{i}", block, ("hidden",)) for i in range(len(dit.transformer_blocks))),
            Unit("proj_out", project, ("hidden",)),
        ]
