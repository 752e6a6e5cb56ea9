"""Adapter of DiT (arXiv:2212.09748), which is conditioned on classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, int64, nn
from torch.nn import functional as F

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


@dataclass(frozen=True)
class DiT(PretrainedSource):
    """DiT pipeline in a folder or on the Hugging Face hub.

    Example:
        >>> pipeline = DiT("facebook/DiT-XL-2-256", dtype="float16").load()
        >>> images = pipeline.sample(["tench", "980"], seeds=[0, 1], steps=50, guidance=4.0)
    """

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiTPipeline,)

    def make_adapter(
        self, transformer: ModelMixin, pipe: DiffusionPipeline | None = None
    ) -> "DiTAdapter":
        return DiTAdapter(transformer, pipe)


class FirstBlockCall(Call):
    """Call of the first block that also returns its embedding of timestep and class.

    The output layer of DiT calls `transformer_blocks.0.norm1.emb` a second time. The embedding
    therefore becomes an output of the first block's unit.
    """

    def __call__(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        hidden = super().__call__(module)
        condition = module.norm1.emb(**self.kwargs, hidden_dtype=hidden.dtype)  # pyright: ignore
        return hidden, condition


class DiTAdapter(TransformerAdapter):
    """Adapter that splits a DiT into its patch embedding, its blocks and its two output layers.

    Example:
        >>> adapter = DiT("facebook/DiT-XL-2-256").load()
        >>> adapter.pipeline_inputs(["tench", "980"])
        [0, 980]
    """

    def pipeline_inputs(self, prompts: Sequence[str]) -> Sequence[int]:
        """Return the number of the class that each prompt names."""
        return [self.parse_class(prompt) for prompt in prompts]

    def parse_class(self, prompt: str) -> int:
        """Return the number of a class.

        Args:
            prompt: The number, or one of the names in the pipeline's `id2label`.

        Raises:
            UserError: if there is no such class.
        """
        names: dict[str, int] = self.pipe.labels
        count: int = self.transformer.config.num_embeds_ada_norm
        if prompt in names:
            return names[prompt]
        if prompt.isdecimal() and int(prompt) < count:
            return int(prompt)
        close = get_close_matches(prompt, names, n=1)
        hint = f", such as {close[0]!r}" if close else ""
        raise UserError(
            f"{prompt!r} is not a class: give a number below {count}, or a name that the model "
            f"knows{hint}"
        )

    def meta_call(self, n: int) -> Call:
        numbers = self.make_meta_tensor(n, dtype=int64)
        return Call((self.make_meta_latent(n),), {"timestep": numbers, "class_labels": numbers})

    def initial_state(self, call: Call) -> ActivationState:
        arguments = call.bind_arguments(self.transformer)
        return {
            "latent": arguments["hidden_states"],
            "timestep": arguments["timestep"],
            "label": arguments["class_labels"],
        }

    def units(self) -> list[Unit]:
        transformer = self.transformer

        def make_proj_out_1_call(state: ReadOnlyState) -> Call:
            return Call((F.silu(state["condition"]),), {})

        def make_proj_out_2_call(state: ReadOnlyState) -> Call:
            shift, scale = state["modulation"][:, None].chunk(2, dim=2)
            return Call((transformer.norm_out(state["hidden"]) * (1 + scale) + shift,), {})

        return [
            make_simple_unit("pos_embed", ("latent",), ("hidden",)),
            *(make_block_unit(i) for i in range(len(transformer.transformer_blocks))),
            Unit("proj_out_1", ("condition",), make_proj_out_1_call, ("modulation",)),
            Unit("proj_out_2", ("hidden", "modulation"), make_proj_out_2_call, ("hidden",)),
        ]

    def read_prediction(self, state: ReadOnlyState) -> Float[Tensor, "n noise"]:
        return read_noise_channels(state["hidden"], self.transformer)


def make_block_unit(i: int) -> Unit:
    """Make the unit of block `i`."""
    call_class, outputs = Call, ("hidden",)
    if i == 0:
        call_class, outputs = FirstBlockCall, ("hidden", "condition")

    def make_call(state: ReadOnlyState) -> Call:
        kwargs = {"timestep": state["timestep"], "class_labels": state["label"]}
        return call_class((state["hidden"],), kwargs)

    return Unit(f"transformer_blocks.{i}", ("hidden", "timestep", "label"), make_call, outputs)
