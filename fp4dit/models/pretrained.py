"""Find and load a diffusers pipeline: `PretrainedSource`, the base of all sources."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from torch import nn

from fp4dit.models.adapter import TransformerAdapter
from fp4dit.models.hub_files import (
    INDEX,
    TRANSFORMER,
    check_weights_available,
    find_config,
    read_config,
)
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json
from fp4dit.utils.hub import resolve_package_path

PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class PretrainedSource:
    """Diffusers pipeline in a folder or on the Hugging Face hub; the base of all sources.

    Args:
        path: A folder with a `model_index.json`, a hub id, or `pkg://package/folder`. With `base`,
            it may also be a folder or hub id that holds a transformer alone.
        dtype: The name of the dtype of the weights, such as `float16`.
        base: The folder or hub id of a pipeline that has everything that `path` lacks.
        pickle: Whether weights may be pickles, which can run the code of their author when they are
            loaded. Otherwise only safetensors are read.

    Attributes:
        pipelines: The classes of diffusers' pipelines that the adapter is for.

    Example:
        >>> class SD3(PretrainedSource):
        ...     pipelines = (StableDiffusion3Pipeline,)
        ...     def make_adapter(self, transformer, pipe=None):
        ...         return SD3Adapter(transformer, pipe)
    """

    path: str
    dtype: str = "float32"
    base: str | None = field(default=None, kw_only=True)
    pickle: bool = field(default=False, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]

    @property
    def component(self) -> str:
        """The component of the pipeline that is quantized."""
        return TRANSFORMER

    @property
    def draws_from_embeddings(self) -> bool:
        """True if prompts are read from a file of embeddings in place of a text encoder."""
        return False

    def make_adapter(
        self, transformer: ModelMixin, pipe: DiffusionPipeline | None = None
    ) -> TransformerAdapter:
        """Make the adapter of a transformer.

        Args:
            transformer: The transformer, possibly on the meta device.
            pipe: The pipeline around it, if there is one.
        """
        raise NotImplementedError

    def load(self) -> TransformerAdapter:
        """Load the pipeline with its weights."""
        pipe: Any = self.load_pipeline()
        return self.make_adapter(getattr(pipe, self.component), pipe)

    def load_pipeline(self, **components: Any) -> DiffusionPipeline:
        """Load diffusers' pipeline.

        Args:
            components: Components that replace those of the pipeline, by name.

        Raises:
            UserError: if there is no pipeline, if the adapter is for another class, or if the hub
                is needed and cannot be reached.
        """
        folder, pipeline_path = self.validate_path(), self.pipeline_path()
        check_weights_available(folder, f"{self.component}/config.json")
        check_weights_available(pipeline_path, INDEX)
        options: Any = {
            "dtype": getattr(torch, self.dtype),
            "use_safetensors": None if self.pickle else True,
        }
        if pipeline_path != folder:
            transformer = AutoModel.from_pretrained(folder, subfolder=self.component, **options)
            components = {self.component: transformer, **components}
        pipe = DiffusionPipeline.from_pretrained(pipeline_path, **options, **components)
        if not isinstance(pipe, self.pipelines):
            raise self.wrong_pipeline_error(type(pipe).__name__)
        return pipe

    def check(self, prompts: Sequence[str]) -> None:
        """Check, before loading, that the model is not quantized and can draw the prompts.

        Raises:
            UserError: if a prompt cannot be drawn, or as `load_transformer_config` does.
        """
        self.load_transformer_config()

    def check_text_encoder(self) -> None:
        """Check that the pipeline lists a text encoder. The hub is not asked for its list.

        Raises:
            UserError: if it lists none.
        """
        index = self.find_index()
        if index is None:
            return
        for name, component in read_json(index).items():
            if name.startswith("text_encoder") and component[1]:
                return
        raise UserError(
            f"{self.path} has no text encoder that could be quantized: use text_encoder=none"
        )

    def find_index(self) -> Path | None:
        """Return the file on this machine that lists the components of the pipeline, if any."""
        for path in (self.path, self.base):
            if path and (index := find_config(path, INDEX)):
                return index
        return None

    def build_on_meta(self) -> TransformerAdapter:
        """Build the transformer alone on the meta device; only its config is read.

        Raises:
            UserError: if diffusers has no such model, or as `load_transformer_config` does.
        """
        config = self.load_transformer_config()
        class_name = config.get("_class_name")
        model_class = getattr(diffusers, str(class_name), None)
        if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
            raise UserError(f"{self.path} holds a {class_name}, which is not a model of diffusers")
        with torch.device("meta"):
            transformer = cast(Any, model_class).from_config(config)
        # The `to` of diffusers warns about unused dtypes.
        nn.Module.to(transformer, "meta", getattr(torch, self.dtype))
        return self.make_adapter(transformer)

    def load_transformer_config(self) -> dict[str, Any]:
        """Read the config of the transformer, and check that it is not quantized yet.

        Raises:
            UserError: if the config says that the weights are quantized, if there is no config, or
                as `validate_path` does.
        """
        config = read_config(self.validate_path(), f"{self.component}/config.json")
        if quantization := config.get("quantization_config"):
            method = quantization.get("quant_method")
            suffix = f" of {method}" if "quant_method" in quantization else ""
            raise UserError(
                f"{self.path} is quantized already (its {self.component}/config.json has a "
                f"quantization_config{suffix}): give the original model"
            )
        return config

    def validate_path(self) -> str:
        """Return the folder or the hub id of the transformer. A hub id is not looked up.

        Raises:
            UserError: if `path` is a path without a pipeline of the adapter's classes, or if the
                weights are pickles and `pickle` does not allow them.
        """
        folder = resolve_package_path(self.path)
        if not self.pickle:
            refuse_pickles(folder)
            refuse_pickles(self.base and resolve_package_path(self.base))
        if not Path(folder).is_dir():
            if folder != self.path or folder.startswith((".", "/", "~")):
                raise UserError(
                    f"there is no folder {self.path}: give a diffusers pipeline's folder or its "
                    "hub id"
                )
            return folder
        if (Path(folder) / INDEX).is_file():
            self.check_index(Path(folder) / INDEX)
        elif not (self.base and (Path(folder) / self.component).is_dir()):
            raise UserError(f"{self.path} is not a diffusers pipeline: the folder has no {INDEX}")
        return folder

    def check_index(self, path: Path) -> None:
        """Check that a `model_index.json` is of a pipeline that the adapter is for."""
        index = read_json(path)
        class_name = index.get("_class_name")
        if not issubclass(getattr(diffusers, str(class_name), type(None)), self.pipelines):
            raise self.wrong_pipeline_error(class_name)
        if self.component not in index:
            raise UserError(
                f"{self.path} holds a {class_name}, which has no {self.component}: only diffusion "
                "transformers are quantized"
            )

    def pipeline_path(self) -> str:
        """Return the folder or the hub id of the pipeline, which is `base` if `path` has none.

        Raises:
            UserError: as `validate_path` does.
        """
        folder = self.validate_path()
        if self.base is None or (Path(folder) / INDEX).is_file():
            return folder
        return resolve_package_path(self.base)

    def wrong_pipeline_error(self, class_name: str | None) -> UserError:
        """Return the error for a pipeline of a class that the adapter is not for."""
        expected = " or ".join(pipeline.__name__ for pipeline in self.pipelines)
        return UserError(
            f"{self.path} holds a {class_name}; this adapter is for a {expected}. "
            "For others use model=generic"
        )


def refuse_pickles(folder: str | None) -> None:
    """Check that no component of a pipeline has its weights in pickles alone.

    Args:
        folder: A folder; anything else is ignored.

    Raises:
        UserError: with the first such file.
    """
    if not (folder and Path(folder).is_dir()):
        return
    for component in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        names = {path.suffix: path.name for path in component.iterdir()}
        suffixes = names.keys() & PICKLE_SUFFIXES
        if suffixes and ".safetensors" not in names:
            raise UserError(
                f"{component / names[min(suffixes)]} is a pickle, which can run code when it is "
                "loaded: save the pipeline as safetensors, or, if you trust its author, give "
                "+model.pickle=true"
            )
