"""Adapter of any diffusers pipeline whose transformer has blocks.

The units are not written down: `fp4dit.models.traced_adapter` finds them in recorded calls.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import Any, ClassVar

import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from fp4dit.models.hub_files import INDEX, TRANSFORMER, list_indexed_components, read_config
from fp4dit.models.known_content import fill_masks
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.models.prompt_memory import PromptMemory
from fp4dit.models.sketch import SketchAdapter
from fp4dit.models.traced_adapter import GenericAdapter
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class Generic(PretrainedSource):
    """Any diffusers pipeline, in a folder or on the Hugging Face hub.

    Args:
        options: Keyword arguments of the pipeline, such as `height`.
        transformer: The transformer that is quantized, if the pipeline has two.
        embeddings: A file of what the pipeline encoded, which replaces its text encoders. The
            pipeline can then draw the batches of the file only.
        prompt_shapes: The shape of each embedding of a prompt, by the names of the arguments of the
            pipeline; see `fp4dit.models.sketch.make_embeddings`. With it, no weight is needed to
            know the shapes of all activations.

    Example:
        >>> pipeline = Generic("/my/sd3", options={"height": 512, "width": 512}).load()
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    transformer: str | None = field(default=None, kw_only=True)
    embeddings: str | None = field(default=None, kw_only=True)
    prompt_shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiffusionPipeline,)

    @property
    def component(self) -> str:
        return self.transformer or TRANSFORMER

    @property
    def draws_from_embeddings(self) -> bool:
        return bool(self.embeddings)

    def load_pipeline(self, **components: Any) -> DiffusionPipeline:
        """Load diffusers' pipeline, without its text encoders if there are embeddings."""
        if not self.embeddings:
            return super().load_pipeline(**components)
        index = read_config(self.pipeline_path(), INDEX)
        encoders = [name for name in index if name.startswith("text_encoder")]
        pipe = super().load_pipeline(**dict.fromkeys(encoders), **components)
        PromptMemory(self.embeddings).replace_encoder_(pipe)
        return pipe

    def check_text_encoder(self) -> None:
        if self.embeddings:
            raise UserError(
                "with model.embeddings no text encoder is loaded that could be quantized: use "
                "text_encoder=none, or do not use embeddings"
            )
        super().check_text_encoder()

    def check(self, prompts: Sequence[str]) -> None:
        """Check, before loading, that the model is not quantized and that it knows all options.

        Raises:
            UserError: if the pipeline has two transformers and none is chosen, or no parameter of
                an option's name. An option that disappears in `**kwargs` is an error, too.
        """
        super().check(prompts)
        if self.embeddings:
            PromptMemory(self.embeddings).check_prompts(prompts)
        index = read_config(self.pipeline_path(), INDEX)
        check_transformer_chosen(self.path, list_indexed_components(index), self.transformer)
        class_name = index["_class_name"]
        parameters = list(signature(getattr(diffusers, class_name).__call__).parameters)[1:]
        for option in sorted(self.options.keys() - parameters):
            close = get_close_matches(option, parameters)
            hint = f"there are {', '.join(parameters)}"
            if close:
                hint = f"did you mean {' or '.join(close)}?"
            raise UserError(f"model.options.{option}: {class_name} has no such option; {hint}")

    def make_adapter(
        self, transformer: ModelMixin, pipe: DiffusionPipeline | None = None
    ) -> "GenericAdapter":
        adapter = GenericAdapter(transformer, self.options, self.load, pipe)
        if pipe is None and self.prompt_shapes:
            adapter.sketch = self.make_sketch
        return adapter

    def make_sketch(self, transformer: Any) -> SketchAdapter:
        """Make the adapter that knows the calls of a transformer on the meta device."""
        fill_masks(transformer)
        path = self.pipeline_path()
        return SketchAdapter(transformer, path, self.options, self.prompt_shapes, self.load)


def list_transformers(components: Iterable[str], chosen: str | None = None) -> list[str]:
    """Return the names of the transformers of a pipeline that are quantized.

    Args:
        components: The names of the components that the pipeline has.
        chosen: The only one that is quantized; None for all.

    Example:
        >>> list_transformers(["vae", "transformer", "transformer_2"])
        ['transformer', 'transformer_2']
    """
    if chosen is not None:
        return [chosen]
    return [name for name in components if name.startswith(TRANSFORMER)] or [TRANSFORMER]


def check_transformer_chosen(model: str, components: Sequence[str], chosen: str | None) -> None:
    """Check that a transformer of a pipeline with several is chosen.

    Args:
        model: The model, as messages call it.
        components: The names of the components of the pipeline.
        chosen: The name of the chosen transformer; None if none is.

    Raises:
        UserError: if none is chosen, and there are several.
    """
    transformers = list_transformers(components, chosen)
    if len(transformers) > 1:
        first, second, *_ = transformers
        raise UserError(
            f"{model} has {len(transformers)} transformers, {' and '.join(transformers)}: "
            f"stages=experts quantizes both in one run; model.transformer={first} or {second} "
            "chooses one of them"
        )
