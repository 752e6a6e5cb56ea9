"""HunyuanDiT 1.0 to 1.2, from any folder or hub id that diffusers loads."""

from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, HunyuanDiTPipeline, ModelMixin
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from jaxtyping import Float
from torch import Tensor

from fp4dit.calls import Call
from fp4dit.models.checkpoint import Adapter, Checkpoint
from fp4dit.stream import Rows, State, Unit


@dataclass(frozen=True)
class Hunyuan(Checkpoint):
    """Where a HunyuanDiT is and how to load it."""

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (HunyuanDiTPipeline,)

    def around(self, dit: ModelMixin, pipe: DiffusionPipeline | None = None) -> "HunyuanPipeline":
        return HunyuanPipeline(dit, pipe)


class HunyuanPipeline(Adapter):
    """A HunyuanDiT as a chain of units. The long skips are columns: block i of n leaves one for block n - 1 - i."""

    options = MappingProxyType({"use_resolution_binning": False})

    def blank(self, n: int) -> Call:
        config, latent = self.dit.config, self.latent(n)
        given = {
            "encoder_hidden_states": self.empty(n, config.text_len, config.cross_attention_dim),
            "text_embedding_mask": self.empty(n, config.text_len, dtype=torch.int64),
            "encoder_hidden_states_t5": self.empty(n, config.text_len_t5, config.cross_attention_dim_t5),
            "text_embedding_mask_t5": self.empty(n, config.text_len_t5, dtype=torch.int64),
            "image_meta_size": self.empty(n, 6),
            "style": self.empty(n, dtype=torch.int64),
            "image_rotary_emb": self.rotary(latent),
            "return_dict": False,
        }
        return Call((latent, self.empty(n)), given)

    def begin(self, call: Call) -> State:
        given = call.named(self.dit)
        state = {
            "latent": given["hidden_states"],
            "timestep": given["timestep"],
            "clip": given["encoder_hidden_states"],
            "t5": given["encoder_hidden_states_t5"],
            "mask": torch.cat([given["text_embedding_mask"], given["text_embedding_mask_t5"]], dim=1).bool(),
        }
        conditions = ("image_meta_size", "style") if self.dit.config.use_style_cond_and_image_meta_size else ()
        return state | {name: given[name] for name in conditions}

    def units(self) -> list[Unit]:
        dit, count = self.dit, len(self.dit.blocks)
        first_half = range(count // 2 - 1)

        def embed_time(s: Rows) -> Call:
            conditions = (s.get("image_meta_size"), s.get("style"))
            return Call((s["timestep"], s["t5"], *conditions), {"hidden_dtype": s["timestep"].dtype})

        def block(i: int) -> Unit:
            source, target = (f"skip_{j}" if j in first_half else "hidden" for j in (i - 1, i))
            skip = (f"skip_{count - 1 - i}",) if i > count // 2 else ()

            def call(s: Rows) -> Call:
                text = torch.cat([s["clip"], s["text"]], dim=1)
                given = {
                    "encoder_hidden_states": torch.where(s["mask"][..., None], text, dit.text_embedding_padding),
                    "temb": s["time"],
                    "image_rotary_emb": self.rotary(s["latent"]),
                    "skip": s[skip[0]] if skip else None,
                }
                return Call((s[source],), given)

            return Unit(f"blocks.{i}", (source, *skip, "time", "clip", "text", "mask", "latent"), call, (target,))

        return [
            Unit("pos_embed", ("latent",), lambda s: Call((s["latent"],), {}), ("hidden",)),
            Unit("time_extra_emb", ("timestep", "t5", "image_meta_size", "style"), embed_time, ("time",)),
            Unit("text_embedder", ("t5",), lambda s: Call((s["t5"],), {}), ("text",)),
            *(block(i) for i in range(count)),
            Unit("norm_out", ("hidden", "time"), lambda s: Call((s["hidden"], s["time"].float()), {}), ("hidden",)),
            Unit("proj_out", ("hidden",), lambda s: Call((s["hidden"],), {}), ("hidden",)),
        ]

    def rotary(self, latent: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"]]:
        """Cosines and sines of the positions of a latent's patches, as the pipeline hands them to its transformer."""
        config = self.dit.config
        height, width = (side // config.patch_size for side in latent.shape[2:])
        return rotary(config.attention_head_dim, height, width, 64 // config.patch_size, latent.device)


@lru_cache(maxsize=8)
def rotary(
    head: int, height: int, width: int, base: int, device: torch.device
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"]]:
    """For a grid of patches, scaled to the `base` patches a side of the 512 pixels that the model began with."""
    region = get_resize_crop_region_for_grid((height, width), base)
    return get_2d_rotary_pos_embed(head, region, (height, width), device=device, output_type="pt")  # pyright: ignore[reportReturnType]
