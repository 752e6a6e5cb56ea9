"""Calls of a transformer without text encoders, autoencoders and weights.

Only a pipeline knows the arguments of its transformer. A sketch is a pipeline of the same class
whose transformer is on the meta device, and whose prompts are embeddings that are made up. Shapes
do not depend on their values.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor

from fp4dit.models.hub_files import INDEX, TRANSFORMER, find_config, read_config
from fp4dit.models.traced_adapter import GenericAdapter
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json

SAMPLES = "n"  # stands for the number of prompts in a shape

# The shape of each embedding of one prompt, by the names of the arguments of the pipeline.
PromptShapes = Mapping[str, Sequence[int | str]]


class SketchAdapter(GenericAdapter):
    """Adapter that makes the calls of a transformer from made-up embeddings.

    Args:
        transformer: The transformer, on the meta device.
        path: The folder or the hub id of the pipeline.
        options: Keyword arguments of the pipeline.
        shapes: The shape of each embedding of a prompt; see `make_embeddings`.
        load: Loads the pipeline with its weights.

    Example:
        >>> shapes = {"prompt_embeds": [512, "joint_attention_dim"], "pooled_prompt_embeds": [768]}
        >>> adapter = SketchAdapter(flux, "black-forest-labs/FLUX.1-dev", {}, shapes, load)
        >>> adapter.record_first_calls()[0].kwargs["img_ids"].shape
        torch.Size([4096, 3])
    """

    def __init__(
        self,
        transformer: Any,
        path: str,
        options: Mapping[str, Any],
        shapes: PromptShapes,
        load: Callable[[], Any],
    ) -> None:
        super().__init__(transformer, options, load, build_sketch(path, transformer))
        self.shapes = shapes

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        """Run the pipeline with made-up embeddings of so many prompts, as far as it goes."""
        embeddings = make_embeddings(self.pipe, self.shapes, self.transformer, len(prompts))
        return self.run_pipeline(None, seeds, steps, guidance, **self.options, **embeddings)


def build_sketch(path: str, transformer: Any) -> DiffusionPipeline:
    """Build a pipeline that has a transformer and no weights, and computes on the CPU.

    Args:
        path: The folder or the hub id of the pipeline.
        transformer: The transformer, in place of each transformer of the pipeline.
    """
    index = read_config(path, INDEX)
    pipeline_class = getattr(diffusers, index["_class_name"])
    components: dict[str, Any] = {}
    for name, parameter in list(signature(pipeline_class.__init__).parameters.items())[1:]:
        entry = index.get(name)
        if name.startswith(TRANSFORMER):
            components[name] = transformer
        elif isinstance(entry, list):
            components[name] = build_component(path, name, *entry)
        elif entry is not None or parameter.default is Parameter.empty:
            components[name] = entry
    cpu = property(lambda _: torch.device("cpu"))
    members = {"device": cpu, "_execution_device": cpu, "__module__": pipeline_class.__module__}
    return type(pipeline_class.__name__, (pipeline_class,), members)(**components)


def build_component(path: str, name: str, library: str | None, class_name: str | None) -> Any:
    """Build a component of a pipeline: a scheduler with default options, or None for most models.

    Models of diffusers whose config is on this machine are built on the meta device, because the
    sizes of latents depend on that of an autoencoder. Without it, pipelines have default sizes.
    """
    if library != "diffusers":
        return None
    component_class: Any = getattr(diffusers, str(class_name))
    if not issubclass(component_class, ModelMixin):
        return component_class()
    file = find_config(path, f"{name}/config.json")
    if file is None:
        return None
    with torch.device("meta"):
        return cast(Any, component_class).from_config(read_json(file))


def make_embeddings(
    pipe: DiffusionPipeline, shapes: PromptShapes, transformer: Any, count: int
) -> dict[str, Any]:
    """Make up the embeddings of prompts, and of negative prompts where the pipeline takes them.

    Args:
        pipe: The pipeline.
        shapes: The shape of each embedding of one prompt. A word is an entry of the transformer's
            config, such as `joint_attention_dim` or, of a list, `caption_channels.0`. The prompts
            come first, or where a shape says `n`. A mask masks nothing.
        transformer: The transformer.
        count: The number of prompts.

    Returns:
        Keyword arguments of the pipeline.

    Raises:
        UserError: if the pipeline has no argument of such a name, or the config no such entry.
    """
    parameters = signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name not in parameters:
            raise UserError(
                f"model.prompt_shapes.{name}: {type(pipe).__name__} has no such argument; there "
                f"are {', '.join(parameters)}"
            )
        sizes = [read_size(transformer.config, size) for size in shape]
        for argument in (name, f"negative_{name}"):
            if argument in parameters:
                arguments[argument] = make_embedding(
                    argument, parameters[argument], sizes, count, transformer.dtype
                )
    if "negative_prompt" in parameters:  # whose default may be an empty text
        arguments["negative_prompt"] = None
    return arguments


def make_embedding(
    name: str,
    parameter: Parameter,
    sizes: Sequence[int | str],
    count: int,
    dtype: torch.dtype,
) -> Tensor | list[Tensor]:
    """Make up one argument for all prompts: zeros, or a mask of ones."""
    value, is_mask = 0, "mask" in name
    if is_mask:
        value, dtype = 1, torch.bool
    if str(parameter.annotation).startswith("list[torch"):  # one tensor for each prompt
        return [torch.full(tuple(sizes), value, dtype=dtype) for _ in range(count)]  # pyright: ignore
    batched = sizes if SAMPLES in sizes else [SAMPLES, *sizes]
    shape = [count if size == SAMPLES else int(size) for size in batched]
    return torch.full(shape, value, dtype=dtype)


def read_size(config: Any, size: int | str) -> int | str:
    """Return a size, or the entry of a transformer's config that it names.

    Raises:
        UserError: if there is no such entry.
    """
    if isinstance(size, int) or size == SAMPLES:
        return size
    value = config
    for key in size.split("."):
        try:
            value = value[int(key) if key.isdigit() else key]
        except (KeyError, IndexError) as error:
            raise UserError(
                f"model.prompt_shapes: the transformer's config has no entry {size}; there are "
                f"{', '.join(key for key in config if not key.startswith('_'))}"
            ) from error
    return value
