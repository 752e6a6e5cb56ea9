"""Adapter of HunyuanDiT 1.0 to 1.2 (arXiv:2405.08748)."""

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

# The side of the images that the first HunyuanDiT was trained on, in latent pixels (512 / 8).
BASE_LATENT_SIZE = 64


@dataclass(frozen=True)
class Hunyuan(PretrainedSource):
    """HunyuanDiT pipeline in a folder or on the Hugging Face hub.

    Example:
        >>> pipeline = Hunyuan("Tencent-Hunyuan/HunyuanDiT-Diffusers", dtype="float16").load()
    """

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (HunyuanDiTPipeline,)

    def make_adapter(
        self, transformer: ModelMixin, pipe: DiffusionPipeline | None = None
    ) -> "HunyuanAdapter":
        return HunyuanAdapter(transformer, pipe)


class HunyuanAdapter(TransformerAdapter):
    """Adapter that splits a HunyuanDiT into its embeddings, its blocks and its output layers.

    Long skip connections are activations of their own: of n blocks, block i writes `skip_i`, which
    block n - 1 - i reads.

    Example:
        >>> units = HunyuanAdapter(transformer).units()
        >>> units[3].module, units[3].outputs
        ('blocks.0', ('skip_0',))
    """

    options = MappingProxyType({"use_resolution_binning": False})

    def meta_call(self, n: int) -> Call:
        config, latent = self.transformer.config, self.make_meta_latent(n)
        clip_shape = (n, config.text_len, config.cross_attention_dim)
        t5_shape = (n, config.text_len_t5, config.cross_attention_dim_t5)
        kwargs = {
            "encoder_hidden_states": self.make_meta_tensor(*clip_shape),
            "text_embedding_mask": self.make_meta_tensor(*clip_shape[:2], dtype=torch.int64),
            "encoder_hidden_states_t5": self.make_meta_tensor(*t5_shape),
            "text_embedding_mask_t5": self.make_meta_tensor(*t5_shape[:2], dtype=torch.int64),
            "image_meta_size": self.make_meta_tensor(n, 6),
            "style": self.make_meta_tensor(n, dtype=torch.int64),
            "image_rotary_emb": self.make_rotary_embedding(latent),
            "return_dict": False,
        }
        return Call((latent, self.make_meta_tensor(n)), kwargs)

    def initial_state(self, call: Call) -> ActivationState:
        arguments = call.bind_arguments(self.transformer)
        masks = [arguments["text_embedding_mask"], arguments["text_embedding_mask_t5"]]
        state = {
            "latent": arguments["hidden_states"],
            "timestep": arguments["timestep"],
            "clip": arguments["encoder_hidden_states"],
            "t5": arguments["encoder_hidden_states_t5"],
            "mask": torch.cat(masks, dim=1).bool(),
        }
        # HunyuanDiT 1.2 has no conditions on size and style.
        if self.transformer.config.use_style_cond_and_image_meta_size:
            state["image_meta_size"] = arguments["image_meta_size"]
            state["style"] = arguments["style"]
        return state

    def units(self) -> list[Unit]:
        count = len(self.transformer.blocks)
        time_inputs = ("timestep", "t5", "image_meta_size", "style")
        return [
            make_simple_unit("pos_embed", ("latent",), ("hidden",)),
            Unit("time_extra_emb", time_inputs, make_time_call, ("time",)),
            make_simple_unit("text_embedder", ("t5",), ("text",)),
            *(self.make_block_unit(i, count) for i in range(count)),
            Unit("norm_out", ("hidden", "time"), make_norm_call, ("hidden",)),
            make_simple_unit("proj_out", ("hidden",), ("hidden",)),
        ]

    def read_prediction(self, state: ReadOnlyState) -> Float[Tensor, "n noise"]:
        return read_noise_channels(state["hidden"], self.transformer)

    def make_block_unit(self, i: int, count: int) -> Unit:
        """Make the unit of block `i` of `count`."""
        num_skips = count // 2 - 1  # the first blocks, each with a skip connection
        source = f"skip_{i - 1}" if 0 <= i - 1 < num_skips else "hidden"
        target = f"skip_{i}" if i < num_skips else "hidden"
        skip = f"skip_{count - 1 - i}" if i > count // 2 else None

        def make_call(state: ReadOnlyState) -> Call:
            text = torch.cat([state["clip"], state["text"]], dim=1)
            padding = self.transformer.text_embedding_padding
            kwargs = {
                "encoder_hidden_states": torch.where(state["mask"][..., None], text, padding),
                "temb": state["time"],
                "image_rotary_emb": self.make_rotary_embedding(state["latent"]),
                "skip": state[skip] if skip else None,
            }
            return Call((state[source],), kwargs)

        skips = (skip,) if skip else ()
        inputs = (source, *skips, "time", "clip", "text", "mask", "latent")
        return Unit(f"blocks.{i}", inputs, make_call, (target,))

    def make_rotary_embedding(
        self, latent: Float[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"]]:
        """Return the cosines and sines of the positions of a latent's patches.

        The pipeline passes the same embedding to its transformer.
        """
        config = self.transformer.config
        height, width = (side // config.patch_size for side in latent.shape[2:])
        base = BASE_LATENT_SIZE // config.patch_size
        return compute_rotary_embedding(
            config.attention_head_dim, height, width, base, latent.device
        )


def make_time_call(state: ReadOnlyState) -> Call:
    """Make the call of the embedding of the timestep and of the conditions that the model has."""
    conditions = (state.get("image_meta_size"), state.get("style"))
    dtype = state["timestep"].dtype
    return Call((state["timestep"], state["t5"], *conditions), {"hidden_dtype": dtype})


def make_norm_call(state: ReadOnlyState) -> Call:
    """Make the call of the output norm, which takes the time embedding in float32."""
    return Call((state["hidden"], state["time"].float()), {})


@lru_cache(maxsize=8)
def compute_rotary_embedding(
    head_dim: int, height: int, width: int, base: int, device: torch.device
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"]]:
    """Compute the rotary embedding of a grid of patches.

    Args:
        head_dim: The width of an attention head.
        height: The number of patches in a column of the grid.
        width: The number of patches in a row of the grid.
        base: The side, in patches, of the grid that positions are scaled to.
        device: The device of the result.
    """
    region = get_resize_crop_region_for_grid((height, width), base)
    size = (height, width)
    return get_2d_rotary_pos_embed(head_dim, region, size, device=device, output_type="pt")  # pyright: ignore[reportReturnType]
