"""Adapter of any diffusers pipeline whose transformer has a list of blocks.

The units are not written down: `fp4dit.models.tracing` finds them in a recorded call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from torch.utils._pytree import tree_map

from fp4dit.models.adapter import TransformerAdapter
from fp4dit.models.blocks import ActivationState, Unit
from fp4dit.models.hub_files import INDEX, read_config
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.models.testing import verify_adapter
from fp4dit.models.traced_arguments import RowShape, TracedArguments
from fp4dit.models.tracing import PartReached, trace_call
from fp4dit.utils.calls import Call, remove_hooks
from fp4dit.utils.errors import UserError

# The prompts of the recorded call. Three is an odd number of samples, which is unlikely to equal
# another dimension.
TRACE_PROMPTS = ("a", "b", "c")
TRACE_GUIDANCE = 4.5


@dataclass(frozen=True)
class Generic(PretrainedSource):
    """Any diffusers pipeline, in a folder or on the Hugging Face hub.

    Args:
        options: Keyword arguments of the pipeline, such as `height`.

    Example:
        >>> pipeline = Generic("/my/sd3", options={"height": 512, "width": 512}).load()
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiffusionPipeline,)

    def check(self, prompts: Sequence[str]) -> None:
        """Check, before loading, that the model is not quantized and that it knows all options.

        Raises:
            UserError: if the pipeline has no parameter of an option's name. An option that
                disappears in `**kwargs` is an error, too.
        """
        super().check(prompts)
        class_name = read_config(self.pipeline_path(), INDEX)["_class_name"]
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
        return GenericAdapter(transformer, self.options, self.load, pipe)


class GenericAdapter(TransformerAdapter):
    """Adapter that finds the units of a transformer by tracing one call.

    Args:
        transformer: The transformer.
        options: Keyword arguments of the pipeline.
        load: Loads the pipeline with its weights. A transformer on the meta device needs it to be
            traced, because only a pipeline knows the arguments of its transformer.
        pipe: The pipeline around the transformer.

    Example:
        >>> adapter = Generic("/my/sd3", options={"height": 512, "width": 512}).load()
        >>> adapter.units()[0].module
        'pos_embed'
    """

    def __init__(
        self,
        transformer: ModelMixin,
        options: Mapping[str, Any],
        load: Callable[[], Any],
        pipe: DiffusionPipeline | None = None,
    ) -> None:
        super().__init__(transformer, pipe)
        self.options, self.load = options, load
        self.arguments: TracedArguments | None = None
        self.cached_units: list[Unit] | None = None

    def meta_call(self, n: int) -> Call:
        def make_meta_rows(shape: RowShape) -> Tensor:
            return shape.make_zeros(n, torch.device("meta"))

        self.units()
        assert self.arguments is not None
        return self.arguments.make_call(make_meta_rows)

    def initial_state(self, call: Call) -> ActivationState:
        self.arguments = self.arguments or TracedArguments.from_call(self.transformer, call)
        return self.arguments.read_state(self.transformer, call)

    def units(self) -> list[Unit]:
        """Return the units of the transformer.

        The first time, the transformer runs twice on a few samples: once to trace the call, and
        once to verify that the units compute the same.

        Raises:
            UserError: if a part prevents that the transformer is split into units.
        """
        if self.cached_units is None:
            call = self.record_first_call()
            trace = trace_call(self.transformer, call)
            self.arguments, self.cached_units = trace.arguments, trace.make_units(self.transformer)
            if self.device.type != "meta":
                verify_adapter(self, call)
        return self.cached_units

    def record_first_call(self) -> Call:
        """Return the call of the transformer at the first denoising step of the pipeline."""
        if self.pipe is None:
            call = self.load().record_first_call()
            return Call(tree_map(to_meta, call.args), tree_map(to_meta, call.kwargs))

        def stop(_: Any, args: tuple, kwargs: dict) -> None:
            raise PartReached(Call(args, kwargs))

        with remove_hooks([self.transformer.register_forward_pre_hook(stop, with_kwargs=True)]):
            try:
                self.sample(TRACE_PROMPTS, range(len(TRACE_PROMPTS)), 1, TRACE_GUIDANCE)
            except PartReached as reached:
                return reached.call
        raise UserError(f"{type(self.pipe).__name__} draws without calling its transformer")


def to_meta(value: Any) -> Any:
    """Move a tensor to the meta device; return anything else unchanged."""
    return value.to("meta") if isinstance(value, Tensor) else value
