"""Find the units of any transformer by tracing its calls.

A part is a module with weights that the transformer itself runs: a block, an embedding, an output
layer. Between its parts a transformer computes things without weights: positions, masks,
concatenations. To repeat the call of one part, the transformer itself runs up to that part, and all
parts before it are replaced by their recorded outputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from fp4dit.models.blocks import ReadOnlyState
from fp4dit.models.call_kinds import CallKind
from fp4dit.models.dependencies import DependencyTracker
from fp4dit.models.templates import Rows, fill_template, list_rows, make_template
from fp4dit.models.testing import ADAPTER_HINT
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.calls import Call, remove_hooks
from fp4dit.utils.errors import UserError


def list_parts(transformer: nn.Module) -> set[str]:
    """List the modules that are parts where the transformer itself runs them.

    These are its modules with weights, except those that contain a whole block: such a module is
    looked into, as the transformer is.

    Raises:
        UserError: if there is no block.
    """
    blocks = find_blocks(transformer)
    parts = set()
    for name, module in transformer.named_modules():
        has_block = any(block.startswith(f"{name}." if name else "") for block in blocks)
        has_weights = any(isinstance(inner, nn.Linear | _ConvNd) for inner in module.modules())
        if has_weights and not (has_block and name not in blocks):
            parts.add(name)
    return parts


def find_blocks(transformer: nn.Module) -> list[str]:
    """Find the blocks of a transformer: modules of the classes that its own class names.

    If its class names none, they are the items of its lists of modules.

    Raises:
        UserError: if there is none.
    """
    repeated = getattr(transformer, "_repeated_blocks", None)
    classes = repeated or getattr(transformer, "_no_split_modules", None) or ()
    blocks: list[str] = []
    for name, module in transformer.named_modules():
        is_inside = any(name.startswith(f"{block}.") for block in blocks)
        if name and type(module).__name__ in classes and not is_inside and find_layers(module):
            blocks.append(name)
    if blocks:
        return blocks
    for name, module in transformer.named_children():
        if isinstance(module, nn.ModuleList):
            blocks += [f"{name}.{i}" for i, block in module.named_children() if find_layers(block)]
    if not blocks:
        children = []
        for name, child in transformer.named_children():
            children.append(f"{name} ({type(child).__name__})")
        raise UserError(
            f"{type(transformer).__name__} has no list of blocks, only {', '.join(children)}. "
            f"{ADAPTER_HINT}"
        )
    return blocks


class PartReached(Exception):
    """Stops the run of a transformer at a part.

    Args:
        call: The call of that part.
    """

    def __init__(self, call: Call) -> None:
        self.call = call


class RunCounter:
    """Names the runs of modules in a call: the name of the module, and a number from the second on.

    Example:
        >>> counter = RunCounter()
        >>> counter.name_run("embed"), counter.name_run("embed")
        ('embed', 'embed#2')
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def name_run(self, module: str) -> str:
        """Return the name of the next run of a module."""
        count = self.counts[module] = self.counts.get(module, 0) + 1
        return module if count == 1 else f"{module}#{count}"


def get_module_name(run: str) -> str:
    """Return the name of the module of a run."""
    return run.partition("#")[0]


@torch.no_grad()
def record_parts(transformer: nn.Module, call: Call, parts: Collection[str]) -> dict[str, Any]:
    """Run a call of a transformer, and return the output of each run of a part, in order."""
    outputs: dict[str, Any] = {}
    running: list[str] = []
    counter = RunCounter()

    def enter(name: str, *_: Any) -> None:
        running.append(name)

    def leave(name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
        running.pop()
        if not running:  # the transformer itself has run it
            outputs[counter.name_run(name)] = output

    hooks = []
    for name in parts:
        module = transformer.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(partial(leave, name)))
    with remove_hooks(hooks):
        call(transformer)
    return outputs


@contextmanager
def replace_forwards(
    transformer: nn.Module, names: Collection[str], forward: Callable[..., Any]
) -> Iterator[None]:
    """Replace the forward methods of some parts by `forward(name, *args, **kwargs)`."""
    modules = {name: transformer.get_submodule(name) for name in names}
    originals = {}  # forward methods that are attributes of a module rather than of its class
    for name, module in modules.items():
        if "forward" in vars(module):
            originals[name] = vars(module)["forward"]
        module.forward = partial(forward, name)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if name in originals:
                vars(module)["forward"] = originals[name]


@dataclass(frozen=True)
class TransformerTrace:
    """Record of the calls of one kind of a transformer.

    Args:
        kind: The kind of the calls.
        outputs: The template of the output of each run of a part, by the name of the run, in order.

    Example:
        >>> trace = trace_kind(transformer, kind)
        >>> call = trace.make_part_call(transformer, "blocks.1", state)
    """

    kind: CallKind
    outputs: Mapping[str, Any]

    def replace_parts(
        self, transformer: nn.Module, replay: Callable[..., Any]
    ) -> Any:  # a context manager
        """Replace all parts by `replay(run, *args, **kwargs)` inside the `with` statement."""
        counter = RunCounter()

        def forward(name: str, *args: Any, **kwargs: Any) -> Any:
            return replay(counter.name_run(name), *args, **kwargs)

        return replace_forwards(transformer, {*map(get_module_name, self.outputs)}, forward)

    def make_part_call(self, transformer: nn.Module, part: str, state: ReadOnlyState) -> Call:
        """Make the call of one part.

        Args:
            transformer: The transformer.
            part: The name of the part's run.
            state: The rows of the activations that the call depends on. Arguments among the others
                are replaced by examples, and outputs of parts by anything.
        """
        count, device = len(state["timestep"]), state["timestep"].device

        def fill(rows: Rows) -> Tensor:
            if rows.name in state:
                return state[rows.name]
            return rows.repeat_example(count).to(device)

        def fill_output(rows: Rows) -> Tensor:
            if rows.name in state or not rows.example.dtype.is_floating_point:
                return fill(rows)
            return torch.empty(
                (count, *rows.example.shape), dtype=rows.example.dtype, device=device
            )

        def replay(run: str, *args: Any, **kwargs: Any) -> Any:
            if run == part:
                raise PartReached(Call(args, kwargs))
            return fill_template(self.outputs[run], count, fill_output)

        with self.replace_parts(transformer, replay):
            try:
                self.kind.fill(count, fill, device)(transformer)
            except PartReached as reached:
                return reached.call
        raise AssertionError(f"{part} ran when the call was traced, and now it does not run")

    def find_part_inputs(self, transformer: nn.Module) -> dict[str, tuple[str, ...]]:
        """Find the activations that the call of each run of a part depends on.

        The timestep always counts. If the transformer reads the values of a tensor, as the lengths
        of masks, everything after that depends on it.
        """
        tracker, names = DependencyTracker(), ["timestep"]
        inputs: dict[str, tuple[str, ...]] = {}
        device = next(transformer.parameters()).device

        def fill(rows: Rows) -> Tensor:
            value = rows.repeat_example(2).to(device)
            tracker.name_tensor(rows.name, value)
            if rows.name not in names:
                names.append(rows.name)
            return value

        def replay(run: str, *args: Any, **kwargs: Any) -> Any:
            found = tracker.find_names(tree_leaves((args, kwargs))) | {"timestep"}
            inputs[run] = tuple(name for name in names if name in found)
            return fill_template(self.outputs[run], 2, fill)

        call = self.kind.fill(2, fill, device)
        with self.replace_parts(transformer, replay), tracker, torch.no_grad():
            call(transformer)
        return inputs


def trace_kind(transformer: nn.Module, kind: CallKind, parts: Collection[str]) -> TransformerTrace:
    """Run calls of a kind with one and with two samples, and record the outputs of the parts.

    Raises:
        UserError: if other parts run in another number of samples, or one returns a tensor that
            does not grow with the number of samples.
    """
    device = next(transformer.parameters()).device
    one, two = (record_parts(transformer, kind.make_example_call(n, device), parts) for n in (1, 2))
    class_name = type(transformer).__name__
    if one.keys() != two.keys():
        raise UserError(
            f"{class_name} runs {min(one.keys() ^ two.keys())} for some numbers of samples only. "
            f"{ADAPTER_HINT}"
        )
    outputs = {}
    for run, output in one.items():
        outputs[run] = make_template(output, two[run], (1, 2), run)
        # A placeholder stands for each tensor with a row for each sample.
        has_others = any(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs[run]))
        if has_others or not list_rows(outputs[run]):
            raise UserError(
                f"{run} of {class_name} does not return a row for each sample. {ADAPTER_HINT}"
            )
    return TransformerTrace(kind, outputs)
