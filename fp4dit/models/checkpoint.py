"""What the adapters for diffusers pipelines have in common: finding a checkpoint, loading it, drawing with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.errors import UserError
from fp4dit.resources import locate

INDEX = "model_index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers pipeline in a folder or on the hub. `rest` has all but the transformer if `path` has nothing else."""

    path: str
    dtype: str = "float32"
    rest: str | None = field(default=None, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]  # that the adapter is for
    transformer: ClassVar[type[ModelMixin]]

    def open(self, **parts: Any) -> DiffusionPipeline:
        """With these `parts` in place of what is there. Raises UserError if another pipeline is there, or none."""
        folder, dtype = self.folder(), getattr(torch, self.dtype)
        if self.rest is None or (Path(folder) / INDEX).is_file():
            pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **parts)
        else:
            dit = self.transformer.from_pretrained(folder, subfolder="transformer", dtype=dtype)
            pipe = DiffusionPipeline.from_pretrained(locate(self.rest), transformer=dit, dtype=dtype, **parts)
        if not isinstance(pipe, self.pipelines):
            raise self.refusal(type(pipe).__name__)
        return pipe

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError if it is known before loading that one of them cannot be drawn."""

    def skeleton(self) -> nn.Module:
        """The transformer without its weights, to check rules on before anything is loaded."""
        kind: Any = self.transformer
        config = kind.load_config(self.folder(), subfolder="transformer")
        with init_empty_weights():
            return kind.from_config(config)

    def folder(self) -> str:
        """Raises UserError if this is a path and no such pipeline is there; a hub id is not looked up."""
        folder = locate(self.path)
        if not Path(folder).is_dir():
            if folder != self.path or folder.startswith((".", "/", "~")):
                raise UserError(f"there is no folder {self.path}: give a diffusers pipeline's folder or its hub id")
            return folder
        if not (Path(folder) / INDEX).is_file():
            if self.rest and (Path(folder) / "transformer").is_dir():
                return folder
            raise UserError(f"{self.path} is not a diffusers pipeline: the folder has no {INDEX}")
        found = json.loads((Path(folder) / INDEX).read_text()).get("_class_name")
        if found not in {kind.__name__ for kind in self.pipelines}:
            raise self.refusal(found)
        return folder

    def refusal(self, found: str | None) -> UserError:
        wanted = " or ".join(kind.__name__ for kind in self.pipelines)
        return UserError(f"{self.path} holds a {found}; this adapter is for a {wanted}")


class Adapter:
    """A diffusers pipeline and its transformer, `dit`."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe: Any = pipe
        self.device = torch.device("cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.dit: Any = self.pipe.transformer.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> None:
        self.pipe.to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def draw(
        self, subjects: Sequence[str | int] | None, seeds: Sequence[int], steps: int, guidance: float, **options: Any
    ) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1] of what the pipeline takes first, if that is not among the options. Each one's noise comes
        from its own seed alone."""
        return self.pipe(
            subjects and list(subjects),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **options,
        ).images.float()
