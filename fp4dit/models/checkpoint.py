"""What the adapters for diffusers pipelines have in common: finding a checkpoint, loading it, drawing with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoModel, ConfigMixin, DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.errors import UserError
from fp4dit.resources import locate
from fp4dit.tensors import as_os_errors

INDEX = "model_index.json"
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers pipeline in a folder or on the hub. `rest` has all but the transformer if `path` has nothing else.

    Weights are safetensors, unless `pickle` allows files that may run code of whoever wrote them.
    """

    path: str
    dtype: str = "float32"
    rest: str | None = field(default=None, kw_only=True)
    pickle: bool = field(default=False, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]  # that the adapter is for

    def around(self, dit: ModelMixin, pipe: DiffusionPipeline | None = None) -> "Adapter":
        """The adapter of a transformer, and of the pipeline that it draws in."""
        raise NotImplementedError

    def load(self) -> "Adapter":
        pipe: Any = self.open()
        return self.around(pipe.transformer, pipe)

    def open(self, **parts: Any) -> DiffusionPipeline:
        """With these `parts` in place of what is there. Raises UserError if another pipeline is there, or none."""
        folder, whole = self.folder(), self.whole()
        how: Any = {"dtype": getattr(torch, self.dtype), "use_safetensors": None if self.pickle else True}
        if whole != folder:
            parts = {"transformer": AutoModel.from_pretrained(folder, subfolder="transformer", **how), **parts}
        pipe = DiffusionPipeline.from_pretrained(whole, **how, **parts)
        if not isinstance(pipe, self.pipelines):
            raise self.refusal(type(pipe).__name__)
        return pipe

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError if it is known before loading that one of them cannot be drawn, and as `config`."""
        self.config()

    def check_text_encoder(self) -> None:
        """Raises UserError if it is known before loading that there is no text encoder to be quantized."""
        indices = [Path(locate(path)) / INDEX for path in (self.path, self.rest) if path]
        index = next((path for path in indices if path.is_file()), None)  # none of what is on the hub
        parts = json.loads(index.read_text()) if index else {}
        if index and not any(name.startswith("text_encoder") and kind[1] for name, kind in parts.items()):
            raise UserError(f"{self.path} has no text encoder that could be quantized: use text_encoder=none")

    def skeleton(self) -> "Adapter":
        """The transformer alone and without its weights, on the meta device: nothing but its config is read.

        Raises:
            UserError: as `config`, or if it is none of a transformer of diffusers.
        """
        config = self.config()
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
            raise UserError(f"{self.path} holds a {config.get('_class_name')}, which is no model of diffusers")
        with init_empty_weights():
            dit = cast(Any, kind).from_config(config)
        nn.Module.to(dit, "meta", getattr(torch, self.dtype))  # diffusers' own warns, whatever the model
        return self.around(dit)

    def config(self) -> dict[str, Any]:
        """The transformer's, which has its weights as they were trained.

        Raises:
            UserError: as `folder`, if the config of a hub id is neither here nor to be had, or if it says that the
                weights are quantized.
        """
        loader, folder = cast(Any, AutoModel), self.folder()
        try:
            config = loader.load_config(folder, subfolder="transformer")
        except OSError as error:
            raise UserError(
                f"the transformer/config.json of {self.path} cannot be read: be online, for that file alone is needed "
                "of the hub, or give a diffusers pipeline's folder with model.path"
            ) from error
        if found := config.get("quantization_config"):
            by = f" of {found['quant_method']}" if "quant_method" in found else ""
            raise UserError(
                f"{self.path} is quantized already (its transformer/config.json has a quantization_config{by}): give "
                "the original model"
            )
        return config

    def folder(self) -> str:
        """Raises UserError if this is a path and no such pipeline is there, or one of pickles. A hub id is not looked
        up."""
        folder = locate(self.path)
        if not self.pickle:
            for path in (folder, self.rest and locate(self.rest)):
                refuse_pickles(path)
        if not Path(folder).is_dir():
            if folder != self.path or folder.startswith((".", "/", "~")):
                raise UserError(f"there is no folder {self.path}: give a diffusers pipeline's folder or its hub id")
            return folder
        if not (Path(folder) / INDEX).is_file():
            if self.rest and (Path(folder) / "transformer").is_dir():
                return folder
            raise UserError(f"{self.path} is not a diffusers pipeline: the folder has no {INDEX}")
        index = json.loads((Path(folder) / INDEX).read_text())
        found = index.get("_class_name")
        if not issubclass(getattr(diffusers, str(found), type(None)), self.pipelines):
            raise self.refusal(found)
        if "transformer" not in index:
            raise UserError(
                f"{self.path} holds a {found}, which has no transformer: only diffusion transformers are quantized"
            )
        return folder

    def whole(self) -> str:
        """Where the pipeline is whose transformer may lie elsewhere, in `folder`. Raises UserError as that."""
        folder = self.folder()
        return folder if self.rest is None or (Path(folder) / INDEX).is_file() else locate(self.rest)

    def refusal(self, found: str | None) -> UserError:
        wanted = " or ".join(kind.__name__ for kind in self.pipelines)
        return UserError(f"{self.path} holds a {found}; this adapter is for a {wanted}. Others: model=generic")


def refuse_pickles(folder: str | None) -> None:
    """Raises UserError if a part of the pipeline in this folder, if it is one, has its weights in no other form."""
    parts = sorted(part for part in Path(folder).iterdir() if part.is_dir()) if folder and Path(folder).is_dir() else []
    for part in parts:
        names = {path.suffix: path.name for path in part.iterdir()}
        pickled = names.keys() & PICKLES
        if pickled and ".safetensors" not in names:
            raise UserError(
                f"{part / names[min(pickled)]} is a pickle, which can run code when it is loaded: save the pipeline as "
                "safetensors, or, if you trust who wrote it, give +model.pickle=true"
            )


class Adapter:
    """A transformer, `dit`, and the diffusers pipeline that it draws in; without one it is a chain of units alone.

    `options` are what that is called with, beside prompts, steps, guidance and seeds.
    """

    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, dit: ModelMixin, pipe: DiffusionPipeline | None = None) -> None:
        self.dit: Any = dit.eval().requires_grad_(False)
        self.pipe: Any = pipe
        self.device = dit.device
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)

    def to(self, device: torch.device | str) -> None:
        if self.pipe is None:
            self.dit.to(device)
        else:
            self.pipe.to(device, silence_dtype_warnings=True)  # that float16 cannot run on a CPU, where it does
        self.device = torch.device(device)

    def save(self, folder: Path, base: str) -> None:
        """All of it, as diffusers does, with `base` in place of the folder that it was loaded from.

        Raises:
            UserError: if there is a transformer alone.
        """
        if self.pipe is None:
            raise UserError(f"there is no pipeline around this {type(self.dit).__name__} to be saved with it")
        for part in (self.pipe, *self.pipe.components.values()):
            if isinstance(part, ConfigMixin):
                part.register_to_config(_name_or_path=base)
        with as_os_errors(folder):
            self.pipe.save_pretrained(folder)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the meta device, of the transformer's dtype if no other is given."""
        return torch.empty(shape, dtype=dtype or self.dit.dtype, device="meta")

    def latent(self, n: int) -> Float[Tensor, "n c h w"]:
        config = self.dit.config
        return self.empty(n, config.in_channels, config.sample_size, config.sample_size)

    def subjects(self, prompts: Sequence[str]) -> Sequence[str | int]:
        return list(prompts)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        return self.draw(self.subjects(prompts), seeds, steps, guidance, **self.options)

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
