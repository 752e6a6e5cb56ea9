"""Adapter of any diffusers pipeline whose transformer has blocks.

The units are not written down: `fp4dit.models.traced_adapter` finds them in recorded calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import Any, ClassVar

import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from fp4dit.models.hub_files import INDEX, TRANSFORMER, read_config
from fp4dit.models.known_content import fill_masks
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.models.sketch import SketchAdapter
from fp4dit.models.traced_adapter import GenericAdapter
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class Generic(PretrainedSource):
    """Any diffusers pipeline, in a folder or on the Hugging Face hub.

    Args:
        options: Keyword arguments of the pipeline, such as `height`.
        transformer: The transformer that is quantized, if the pipeline has two.
        prompt_shapes: The shape of each embedding of a prompt, by the names of the arguments of the
            pipeline; see `fp4dit.models.sketch.make_embeddings`. With it, no weight is needed to
            know the shapes of all activations.

    Example:
        >>> pipeline = Generic("/my/sd3", options={"height": 512, "width": 512}).load()
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    transformer: str | None = field(default=None, kw_only=True)
    prompt_shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict, kw_only=True)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiffusionPipeline,)

    @property
    def component(self) -> str:
        return self.transformer or TRANSFORMER

    def check(self, prompts: Sequence[str]) -> None:
        """Check, before loading, that the model is not quantized and that it knows all options.

        Raises:
            UserError: if the pipeline has two transformers and none is chosen, or no parameter of
                an option's name. An option that disappears in `**kwargs` is an error, too.
        """
        super().check(prompts)
        index = read_config(self.pipeline_path(), INDEX)
        present = [name for name, value in index.items() if isinstance(value, list) and value[1]]
        check_transformer_chosen(self.path, present, self.transformer)
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


def check_transformer_chosen(model: str, components: Sequence[str], chosen: str | None) -> None:
    """Check that a transformer of a pipeline with several is chosen.

    Args:
        model: The model, as messages call it.
        components: The names of the components of the pipeline.
        chosen: The name of the chosen transformer; None if none is.

    Raises:
        UserError: if none is chosen, and there are several.
    """
    transformers = [name for name in components if name.startswith(TRANSFORMER)]
    if chosen is None and len(transformers) > 1:
        first, second, *_ = transformers
        raise UserError(
            f"{model} has {len(transformers)} transformers, {' and '.join(transformers)}, and one "
            f"is quantized at a time: give model.transformer={first}, and then quantize what was "
            f"exported again, with model.transformer={second}"
        )
