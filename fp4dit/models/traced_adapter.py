"""Adapter that finds the units of a transformer: `fp4dit.models.tracing` traces its calls."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fp4dit.data.captured import CALL_KIND
from fp4dit.models.adapter import TRUE_GUIDANCE, TransformerAdapter, find_guidance_name
from fp4dit.models.blocks import ActivationState, ReadOnlyState, Unit
from fp4dit.models.call_kinds import CallKind, move_call, read_rows
from fp4dit.models.templates import list_rows
from fp4dit.models.testing import ADAPTER_HINT
from fp4dit.models.tracing import (
    PartReached,
    TransformerTrace,
    get_module_name,
    list_parts,
    record_parts,
    trace_kind,
)
from fp4dit.utils import pytree_io
from fp4dit.utils.calls import Call, remove_hooks
from fp4dit.utils.errors import UserError

log = logging.getLogger(__name__)

# The prompts of the recorded calls. They differ in their lengths, and the numbers of prompts say
# which sizes in a call grow with it.
TRACE_PROMPTS = ("a photo of a red square", "a", "a")
TRACE_COUNTS = (2, 3)
TRACE_GUIDANCE = 4.5
TRACE_STEPS = (1, 4, 16)  # of which the last ones may call a second transformer

WHOLE = ""  # the transformer itself, as the name of a part


class GenericAdapter(TransformerAdapter):
    """Adapter that finds the units of a transformer by tracing one call.

    Args:
        transformer: The transformer.
        options: Keyword arguments of the pipeline.
        load: Loads the pipeline with its weights. A transformer on the meta device without a sketch
            needs it to be traced, because only a pipeline knows the arguments of its transformer.
        pipe: The pipeline around the transformer.

    Attributes:
        sketch: Makes an adapter that knows the calls of a transformer on the meta device.

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
        self.sketch: Callable[[Any], GenericAdapter] | None = None
        self.kind: CallKind | None = None  # that of the first call
        self.by_content = False
        self.parts: Collection[str] = ()
        self.kinds: dict[int, CallKind] = {}
        self.traces: dict[int, TransformerTrace] = {}
        self.cached_units: list[Unit] = []

    def meta_call(self, n: int) -> Call:
        # Without weights to fall back on, tracing the parts would change nothing here.
        kind = self.find_first_kind() if self.sketch is None else self.compare_first_calls()[0]
        return kind.make_example_call(n, next(self.transformer.parameters()).device)

    def initial_state(self, call: Call) -> ActivationState:
        """Return the state of a call, all of whose samples are of one kind."""
        [(_, state)] = self.read_states(call)
        return state

    def read_states(self, call: Call) -> list[tuple[Int[Tensor, "n"], ActivationState]]:
        first, states = self.find_first_kind(), []
        for index, kind, state in first.read_call(self.transformer, call, self.by_content):
            self.kinds.setdefault(kind.number, kind)
            states.append((index, state))
        return states

    def save_call_kinds(self, path: Path) -> None:
        trees = {str(number): kind.to_tree() for number, kind in self.kinds.items()}
        pytree_io.save_tree(trees, path.with_suffix(".kinds"))

    def load_call_kinds(self, folder: Path) -> None:
        self.find_first_kind()
        for path in sorted(folder.glob("*.kinds")):
            for number, tree in pytree_io.load_tree(path).items():
                self.kinds.setdefault(int(number), CallKind.from_tree(tree))
        for number in self.kinds:
            self.trace(number)

    def units(self) -> list[Unit]:
        """Return the units of the transformer.

        The first time, the transformer runs on a few samples: to trace the call, and to verify that
        the units compute the same. If they do not, the whole transformer is one unit.
        """
        self.find_first_kind()
        if not self.cached_units:
            self.cached_units = self.make_units()
        return self.cached_units

    def trace(self, number: int) -> TransformerTrace:
        """Return the trace of a kind of calls. The first time, the transformer runs."""
        if number not in self.traces:
            kind = self.kinds[number]
            self.traces[number] = trace_kind(self.transformer, kind, self.parts)
            self.cached_units = []  # their inputs may be others
        return self.traces[number]

    def find_first_kind(self) -> CallKind:
        """Return the kind of the first call of the pipeline, which is traced the first time."""
        if self.kind is None:
            self.kind, call = self.compare_first_calls()
            try:
                self.trace_parts(call)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model does if its parts are replaced
                if self.device.type == "meta" and not isinstance(error, UserError):
                    # The shapes of some models depend on data, which the meta device does not have.
                    self.use_weights()
                else:
                    self.trace_whole(call, error)
        return self.kind

    def compare_first_calls(self) -> tuple[CallKind, Call]:
        """Return the kind of the first calls of the pipeline, and one of these calls."""
        calls = self.record_first_calls()
        return CallKind.compare(self.transformer, calls, TRACE_COUNTS), calls[0]

    def trace_whole(self, call: Call, error: Exception) -> None:
        """Make the whole transformer one part, because of an error, and warn of it."""
        log.warning(
            "%s is rounded as one unit, which is slower and needs memory for a second copy of it, "
            "because it cannot be run in parts: %s",
            type(self.transformer).__name__,
            error,
        )
        self.parts, self.traces, self.cached_units = {WHOLE}, {}, []
        self.by_content = False
        self.trace(self.read_first_state(call)[0])

    def trace_parts(self, call: Call) -> None:
        """Trace the parts of the transformer, and verify that they compute the same as it does.

        Raises:
            UserError: if they do not, or if there are no parts.
        """
        self.parts = list_parts(self.transformer)
        number, state = self.read_first_state(call)
        self.trace(number)
        if self.device.type == "meta":
            return
        self.by_content = self.depends_on_content(state)
        number, state = self.read_first_state(call)
        self.trace(number)
        self.verify(number, state)

    def read_first_state(self, call: Call) -> tuple[int, ActivationState]:
        """Return the state of the first samples of a call that are of one kind, and its number."""
        assert self.kind is not None
        _, kind, state = self.kind.read_call(self.transformer, call, self.by_content)[0]
        self.kinds[kind.number] = self.kind = kind
        return kind.number, state

    def depends_on_content(self, state: ActivationState) -> bool:
        """Return whether shapes inside the transformer depend on the values of integers."""
        assert self.kind is not None
        shapes = []
        for i in (0, -1):
            one = {name: rows[i].unsqueeze(0) for name, rows in state.items()}
            outputs = record_parts(self.transformer, self.kind.make_call(one), self.parts)
            leaves = tree_leaves(list(outputs.values()))
            shapes.append([leaf.shape for leaf in leaves if isinstance(leaf, Tensor)])
        return shapes[0] != shapes[1]

    @torch.no_grad()
    def verify(self, number: int, state: ActivationState) -> None:
        """Verify that each unit, called alone, computes the same as in the transformer.

        Raises:
            UserError: with the last unit that does not.
        """
        kind, count, units = self.trace(number).kind, len(state["timestep"]), self.make_units()
        outputs = record_parts(self.transformer, kind.make_call(state), self.parts)
        expected, state = [], dict(state)
        for unit, output in zip(units, outputs.values(), strict=True):
            expected.append(unit.read_outputs(output, count))
            state |= zip(unit.outputs, expected[-1], strict=True)
        # From here on nothing that a module keeps from one call to the next is of this call.
        kind.make_call(state | {"latent": state["latent"] + 1})(self.transformer)
        for run, unit, rows in reversed(list(zip(outputs, units, expected, strict=True))):
            output = unit.make_call(state)(self.transformer.get_submodule(unit.module))
            if not all(map(torch.equal, rows, unit.read_outputs(output, count))):
                raise UserError(
                    f"{run} of {type(self.transformer).__name__}, called alone, gives another "
                    f"output than in the model. {ADAPTER_HINT}"
                )

    def make_units(self) -> list[Unit]:
        """Make a unit for each run of a part, with the inputs that it has in any kind of calls.

        Raises:
            UserError: if parts run in some kinds of calls only.
        """
        traces = list(self.traces.values())
        inputs: dict[str, tuple[str, ...]] = {}
        for trace in traces:
            if others := trace.outputs.keys() ^ traces[0].outputs.keys():
                raise UserError(
                    f"{type(self.transformer).__name__} runs {min(others)} in some calls only. "
                    f"{ADAPTER_HINT}"
                )
            for run, names in trace.find_part_inputs(self.transformer).items():
                inputs[run] = tuple(dict.fromkeys((*inputs.get(run, ()), *names, CALL_KIND)))
        units = []
        for run, template in traces[0].outputs.items():
            names = tuple(rows.name for rows in list_rows(template))
            make_call, read_outputs = (
                partial(self.make_part_call, run),
                partial(read_rows, template),
            )
            units.append(Unit(get_module_name(run), inputs[run], make_call, names, read_outputs))
        return units

    def make_part_call(self, run: str, state: ReadOnlyState) -> Call:
        """Make the call of a part in the kind of calls that all rows of the state are of."""
        trace = self.trace(int(state[CALL_KIND][0]))
        return trace.make_part_call(self.transformer, run, state)

    def use_weights(self) -> None:
        """Replace the transformer on the meta device by one with weights."""
        loaded = self.load()
        loaded.find_first_kind()
        self.transformer, self.device = copy.deepcopy(loaded.transformer), loaded.device
        for name in ("kind", "by_content", "parts", "kinds", "traces"):
            setattr(self, name, getattr(loaded, name))

    def record_first_calls(self) -> tuple[Call, Call]:
        """Return the first call of the transformer for two numbers of prompts."""
        if self.pipe is None:
            known = self.sketch(self.transformer) if self.sketch else self.load()
            first, second = known.record_first_calls()
            return move_call(first, "meta"), move_call(second, "meta")
        return self.record_first_call(TRACE_COUNTS[0]), self.record_first_call(TRACE_COUNTS[1])

    def record_first_call(self, count: int) -> Call:
        """Return the first call of the transformer while the pipeline draws some prompts.

        A pipeline with two transformers calls the second one after some steps.
        """

        def stop(_: Any, args: tuple, kwargs: dict) -> None:
            raise PartReached(Call(args, kwargs))

        with remove_hooks([self.transformer.register_forward_pre_hook(stop, with_kwargs=True)]):
            for steps in TRACE_STEPS:
                try:
                    self.sample(TRACE_PROMPTS[:count], range(count), steps, TRACE_GUIDANCE)
                except PartReached as reached:
                    return reached.call
                except ArithmeticError:  # a schedule that needs more steps, such as Mochi's
                    continue
        raise UserError(f"{type(self.pipe).__name__} draws without calling its transformer")

    def name_arguments(self, inputs: Sequence[str | int] | None, guidance: float) -> dict[str, Any]:
        """Return the arguments for the prompts and the guidance, by the names of the pipeline.

        Some pipelines have a second branch with a negative prompt, and a scale of its own for it.
        """
        parameters = signature(type(self.pipe).__call__).parameters
        prompts = "prompt" if "prompt" in parameters else list(parameters)[1]
        arguments: dict[str, Any] = {prompts: inputs}
        name = find_guidance_name(parameters)
        if name is not None:
            arguments[name] = guidance
        if name == TRUE_GUIDANCE and inputs is not None and "negative_prompt" not in self.options:
            arguments["negative_prompt"] = [" "] * len(inputs)
        return arguments
