"""DiT (arXiv:2212.09748), conditioned on classes, from any folder or hub id that diffusers loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin
from torch import Tensor, int64, nn
from torch.nn import functional as F

from fp4dit.calls import Call
from fp4dit.errors import UserError
from fp4dit.models.checkpoint import Adapter, Checkpoint
from fp4dit.stream import Rows, State, Unit


@dataclass(frozen=True)
class DiT(Checkpoint):
    """Where a DiT is and how to load it."""

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiTPipeline,)

    def around(self, dit: ModelMixin, pipe: DiffusionPipeline | None = None) -> "ClassPipeline":
        return ClassPipeline(dit, pipe)


class First(Call):
    """The first block's call. What that makes of timestep and label is asked for too: the last layer needs it again."""

    def __call__(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        hidden = super().__call__(module)
        return hidden, module.norm1.emb(**self.kwargs, hidden_dtype=hidden.dtype)  # pyright: ignore


class ClassPipeline(Adapter):
    """A DiT as a chain of units: its patch embedding, its blocks, its two output layers."""

    def subjects(self, prompts: Sequence[str]) -> Sequence[int]:
        """A prompt is a class: its number, or one of its names in the pipeline's `id2label`."""
        return [self.label(prompt) for prompt in prompts]

    def label(self, prompt: str) -> int:
        """Raises UserError if there is no such class."""
        names: dict[str, int] = self.pipe.labels
        count: int = self.dit.config.num_embeds_ada_norm
        if prompt in names:
            return names[prompt]
        if prompt.isdecimal() and int(prompt) < count:
            return int(prompt)
        close = get_close_matches(prompt, names, n=1)
        hint = f", such as {close[0]!r}" if close else ""
        raise UserError(f"{prompt!r} is no class: give a number below {count}, or a name that the model knows{hint}")

    def blank(self, n: int) -> Call:
        numbers = self.empty(n, dtype=int64)
        return Call((self.latent(n),), {"timestep": numbers, "class_labels": numbers})

    def begin(self, call: Call) -> State:
        given = call.named(self.dit)
        return {"latent": given["hidden_states"], "timestep": given["timestep"], "label": given["class_labels"]}

    def units(self) -> list[Unit]:
        dit = self.dit

        def block(i: int) -> Unit:
            kind, answer = (First, ("hidden", "condition")) if i == 0 else (Call, ("hidden",))
            reads = ("hidden", "timestep", "label")
            call = lambda s: kind((s["hidden"],), {"timestep": s["timestep"], "class_labels": s["label"]})
            return Unit(f"transformer_blocks.{i}", reads, call, answer)

        def project(s: Rows) -> Call:
            shift, scale = s["modulation"][:, None].chunk(2, dim=2)
            return Call((dit.norm_out(s["hidden"]) * (1 + scale) + shift,), {})

        return [
            Unit("pos_embed", ("latent",), lambda s: Call((s["latent"],), {}), ("hidden",)),
            *(block(i) for i in range(len(dit.transformer_blocks))),
            Unit("proj_out_1", ("condition",), lambda s: Call((F.silu(s["condition"]),), {}), ("modulation",)),
            Unit("proj_out_2", ("hidden", "modulation"), project, ("hidden",)),
        ]
