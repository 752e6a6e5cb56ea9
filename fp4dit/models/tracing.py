"""Find the units of any transformer by tracing one call.

Between its parts a transformer computes things without weights: positions, masks, concatenations.
To repeat the call of one part, the transformer itself runs up to that part, and all parts before it
are replaced by their recorded outputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from fp4dit.models.blocks import ReadOnlyState, Unit
from fp4dit.models.testing import ADAPTER_HINT
from fp4dit.models.traced_arguments import (
    NestedTensors,
    RowShape,
    TracedArguments,
    describe_leaf,
)
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.calls import Call, remove_hooks
from fp4dit.utils.errors import UserError


def list_parts(transformer: nn.Module) -> list[str]:
    """List the parts of a transformer that become units.

    These are its children that have layers with weights; a list of blocks counts as its blocks.

    Raises:
        UserError: if there is no list of blocks.
    """
    parts, has_blocks = [], False
    for name, child in transformer.named_children():
        if not find_layers(child):
            continue
        if isinstance(child, nn.ModuleList):
            has_blocks = True
            parts += [f"{name}.{i}" for i, block in child.named_children() if find_layers(block)]
        else:
            parts.append(name)
    if not has_blocks:
        children = []
        for name, child in transformer.named_children():
            children.append(f"{name} ({type(child).__name__})")
        raise UserError(
            f"{type(transformer).__name__} has no list of blocks, only {', '.join(children)}. "
            f"{ADAPTER_HINT}"
        )
    return parts


class PartReached(Exception):
    """Stops the run of a transformer at a part.

    Args:
        call: The call of that part.
    """

    def __init__(self, call: Call) -> None:
        self.call = call


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
    """Record of one call of a transformer.

    Args:
        arguments: The arguments of the call.
        outputs: The output of each part, by its name, in execution order.

    Example:
        >>> units = trace_call(transformer, call).make_units(transformer)
    """

    arguments: TracedArguments
    outputs: Mapping[str, NestedTensors]

    def make_units(self, transformer: nn.Module) -> list[Unit]:
        """Make one unit for each part of the transformer."""
        inputs = self.find_part_inputs(transformer)
        units = []
        for name, output in self.outputs.items():
            make_call = partial(self.make_part_call, transformer, name)
            output_names = tuple(shape.name for shape in output.row_shapes)
            units.append(Unit(name, inputs[name], make_call, output_names))
        return units

    def make_part_call(self, transformer: nn.Module, part: str, rows: ReadOnlyState) -> Call:
        """Make the call of one part.

        Args:
            transformer: The transformer.
            part: The name of the part.
            rows: The rows of the activations that the call depends on. Zeros replace all others.
        """
        timestep = rows["timestep"]

        def fill(shape: RowShape) -> Tensor:
            if shape.name in rows:
                return rows[shape.name]
            return shape.make_zeros(len(timestep), timestep.device)

        def replay(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == part:
                raise PartReached(Call(args, kwargs))
            return self.outputs[name].fill_leaves(fill)

        with replace_forwards(transformer, self.outputs, replay):
            try:
                self.arguments.make_call(fill)(transformer)
            except PartReached as reached:
                return reached.call
        raise AssertionError(f"{part} ran when the call was traced, and now it does not run")

    @torch.enable_grad()
    def find_part_inputs(self, transformer: nn.Module) -> dict[str, tuple[str, ...]]:
        """Find the activations that the call of each part depends on.

        An activation counts if a tensor of the call has a gradient with respect to it. Integers
        have no gradients, so they always count, and so does the timestep.

        Raises:
            UserError: if the transformer itself runs a layer inside a part.
        """
        device = next(transformer.parameters()).device
        sources: dict[str, Tensor] = {}
        inputs: dict[str, tuple[str, ...]] = {}

        def fill(shape: RowShape) -> Tensor:
            rows = shape.make_zeros(2, device).clone()
            sources[shape.name] = rows.requires_grad_(shape.dtype.is_floating_point)
            return sources[shape.name].clone()  # the transformer may write to its inputs

        def replay(name: str, *args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, kwargs))
            values = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            inputs[name] = tuple(
                activation
                for activation, source in sources.items()
                if activation == "timestep" or depends_on(source, values)
            )
            return self.outputs[name].fill_leaves(fill)

        with (
            refuse_inner_layers(transformer, self.outputs),
            replace_forwards(transformer, self.outputs, replay),
        ):
            self.arguments.make_call(fill)(transformer)
        return inputs


@contextmanager
def refuse_inner_layers(transformer: nn.Module, parts: Collection[str]) -> Iterator[None]:
    """Raise an error when a layer that is not itself a part runs.

    The forward methods of the parts are replaced, so only the transformer itself can run it.
    """

    def refuse(name: str, *_: Any) -> None:
        raise UserError(
            f"{type(transformer).__name__} runs {name} itself, outside the block that contains it. "
            f"{ADAPTER_HINT}"
        )

    hooks = []
    for name, layer in find_layers(transformer).items():
        if name not in parts:
            hooks.append(layer.register_forward_pre_hook(partial(refuse, name)))
    with remove_hooks(hooks):
        yield


def depends_on(source: Tensor, values: Sequence[Tensor]) -> bool:
    """Return whether any of the values depends on `source`, or whether it has no gradients.

    Args:
        source: A tensor that the values may be computed from.
        values: Tensors that have gradients.
    """
    if not source.requires_grad:
        return True
    if not values:
        return False
    ones = [torch.ones_like(value) for value in values]
    gradients = torch.autograd.grad(values, source, ones, retain_graph=True, allow_unused=True)
    return gradients[0] is not None


@torch.no_grad()
def trace_call(transformer: nn.Module, call: Call) -> TransformerTrace:
    """Run a call of a transformer, and record its arguments and the outputs of its parts.

    Raises:
        UserError: if a part runs twice, or if a tensor it returns has no row for each sample.
    """
    count = len(next(iter(call.bind_arguments(transformer).values())))
    outputs: dict[str, NestedTensors] = {}

    def record(name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
        part = f"{name} of {type(transformer).__name__}"
        leaves, spec = tree_flatten(output)
        if name in outputs:
            raise UserError(f"{part} runs more than once in a call. {ADAPTER_HINT}")
        if any(isinstance(leaf, Tensor) and len(leaf) != count for leaf in leaves):
            raise UserError(f"{part} does not return a row for each sample. {ADAPTER_HINT}")
        shapes = [describe_leaf(f"{name}.{i}", leaf, count) for i, leaf in enumerate(leaves)]
        outputs[name] = NestedTensors(tuple(shapes), spec)

    hooks = []
    for name in list_parts(transformer):
        module = transformer.get_submodule(name)
        hooks.append(module.register_forward_hook(partial(record, name)))
    with remove_hooks(hooks):
        call(transformer)
    return TransformerTrace(TracedArguments.from_call(transformer, call), outputs)
