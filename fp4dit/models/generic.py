"""Any diffusers pipeline whose transformer has a list of blocks: its units are found by watching it."""

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

from fp4dit.calls import Call, removed
from fp4dit.errors import UserError
from fp4dit.models.check import verify
from fp4dit.models.checkpoint import Adapter, Checkpoint
from fp4dit.models.trace import Arguments, Reached, watch
from fp4dit.stream import State, Unit


@dataclass(frozen=True)
class Generic(Checkpoint):
    """Where the pipeline is and how to load it. `options` are what else it is called with, as `height`."""

    options: Mapping[str, Any] = field(default_factory=dict)

    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (DiffusionPipeline,)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError, too, if the pipeline names no such option: what others some take, they do without."""
        super().check(prompts)
        index: Any = DiffusionPipeline.load_config(self.whole())
        name = index["_class_name"]
        known = list(signature(getattr(diffusers, name).__call__).parameters)[1:]
        for option in sorted(self.options.keys() - known):
            close = get_close_matches(option, known)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"model.options.{option}: a {name} is called with no such option; {hint}")

    def around(self, dit: ModelMixin, pipe: DiffusionPipeline | None = None) -> "GenericPipeline":
        return GenericPipeline(dit, self.options, self.load, pipe)


class GenericPipeline(Adapter):
    """A transformer as a chain of what it is found to run. On the meta device that takes loading the whole with `load`,
    for only a pipeline knows what it calls its transformer with."""

    PROMPTS = ("a", "b", "c")  # an odd number of samples, which no other size is likely to equal

    def __init__(
        self,
        dit: ModelMixin,
        options: Mapping[str, Any],
        load: Callable[[], Any],
        pipe: DiffusionPipeline | None = None,
    ) -> None:
        super().__init__(dit, pipe)
        self.options, self.load = options, load
        self.arguments: Arguments | None = None
        self.chain: list[Unit] | None = None

    def blank(self, n: int) -> Call:
        self.units()
        assert self.arguments is not None
        return self.arguments.call(lambda shape: shape.blank(n, torch.device("meta")))

    def begin(self, call: Call) -> State:
        self.arguments = self.arguments or Arguments.of(self.dit, call)
        return self.arguments.state(self.dit, call)

    def units(self) -> list[Unit]:
        """The first time, the transformer is run on a few samples, twice: to see what it does, and to check that.

        Raises:
            UserError: if it cannot be taken apart; the message names what stands in the way.
        """
        if self.chain is None:
            call = self.first_call()
            trace = watch(self.dit, call)
            self.arguments, self.chain = trace.arguments, trace.units(self.dit)
            if self.device.type != "meta":
                verify(self, call)
        return self.chain

    def first_call(self) -> Call:
        """What the sampler calls the transformer with at its first step."""
        if self.pipe is None:
            call = self.load().first_call()
            emptied = lambda x: x.to("meta") if isinstance(x, Tensor) else x
            return Call(tree_map(emptied, call.args), tree_map(emptied, call.kwargs))

        def stop(_: Any, args: tuple, kwargs: dict) -> None:
            raise Reached(Call(args, kwargs))

        with removed([self.dit.register_forward_pre_hook(stop, with_kwargs=True)]):
            try:
                self.sample(self.PROMPTS, range(len(self.PROMPTS)), 1, 4.5)
            except Reached as reached:
                return reached.call
        raise UserError(f"{type(self.pipe).__name__} draws without calling its transformer")
