"""Find the layers before and after the activation functions of a model, whatever their names."""

import re
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fp4dit.quantization.rules import find_layers
from fp4dit.utils.modules import copy_to_meta

ACTIVATIONS = {F.gelu, F.silu, F.relu, F.mish, torch.relu, F.leaky_relu, F.elu}

ACTIVATION_NAME = re.compile("gelu|silu|swish|swiglu|geglu|relu|mish", re.IGNORECASE)

PROBE_SIZE = 4  # tokens, and pixels of a side


class ActivationNeighbours(NamedTuple):
    """The names of the layers around the activation functions of a model or a module.

    Attributes:
        before: The layers whose output an activation function reads.
        after: The layers that read what was computed from the output of an activation function.
        after_gelu: Of these, the layers that read the output of GELU itself: nothing multiplies it,
            as a gate does, or joins it.

    Example:
        >>> ActivationNeighbours({"net.0.proj"}, {"net.2"}, {"net.2"})
    """

    before: Collection[str]
    after: Collection[str]
    after_gelu: Collection[str]


def find_activation_neighbours(model: nn.Module) -> ActivationNeighbours:
    """Return the layers before and after activation functions, in the model's order.

    They are looked for inside the items of lists of modules, which are blocks. There each module
    that reads a single tensor runs on a small one without content. Modules that read several are
    not run: there the order of the layers and activation modules counts.
    """
    neighbours: tuple[set[str], ...] = (set(), set(), set())
    known: dict[Any, ActivationNeighbours] = {}
    for name, module in model.named_modules():
        layers = find_layers(module)
        is_in_block = any(part.isdigit() for part in name.split("."))
        if not layers or not is_in_block:
            continue
        shapes = tuple((layer, module.get_submodule(layer).weight.shape) for layer in layers)  # pyright: ignore
        key = (type(module), shapes)  # a model has many blocks of one kind
        if key not in known:
            # Linear attention applies activation functions to q and k, which is another matter.
            is_attention = hasattr(module, "set_processor")
            found_by_run = None if is_attention else probe_module(module)
            known[key] = found_by_run or compare_order(module)
        for found, inner_names in zip(neighbours, known[key], strict=True):
            found |= {f"{name}.{inner}" if inner else name for inner in inner_names}
    names = list(find_layers(model))
    return ActivationNeighbours(
        *([name for name in names if name in found] for found in neighbours)
    )


def compare_order(module: nn.Module) -> ActivationNeighbours:
    """Return the children before and after a child that is an activation function.

    The order does not tell whether a layer reads the output of GELU itself.
    """
    before: set[str] = set()
    after: set[str] = set()
    layer, activated = None, False
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | nn.Conv2d):
            if activated:
                after.add(name)
            layer, activated = name, False
        elif layer is not None and is_activation(child):
            before.add(layer)
            activated = True
    return ActivationNeighbours(before, after, ())


def is_activation(module: nn.Module) -> bool:
    """Return whether the class of a module is called as activation functions are."""
    return bool(ACTIVATION_NAME.search(type(module).__name__)) and not find_layers(module)


class ActivationWatcher(TorchFunctionMode):
    """Finds the layers before and after activation functions inside the `with` statement.

    Attributes:
        sources: For each tensor, by its identity, the layers that it was computed from, or None in
            place of an activation function.
        before: The layers whose output an activation function reads.
        after: The layers that read what was computed from the output of an activation function.
        gelus: The identities of the outputs of GELU, also after a dropout.
        after_gelu: The layers that read one of them.

    Example:
        >>> with ActivationWatcher() as watcher:
        ...     feed_forward(torch.empty(1, 4, 64, device="meta"))
        >>> watcher.before
        {'net.0.proj'}
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, set[str | None]] = {}
        self.kept: list[Tensor] = []  # so that no identity is used again
        self.before: set[str] = set()
        self.after: set[str] = set()
        self.gelus: set[int] = set()
        self.after_gelu: set[str] = set()

    def find_sources(self, values: Any) -> set[str | None]:
        """Return what the tensors in nested values were computed from."""
        sources: set[str | None] = set()
        for leaf in tree_leaves(values):
            sources |= self.sources.get(id(leaf), set())
        return sources

    def set_sources(self, values: Any, sources: set[str | None]) -> None:
        """Say what the tensors in nested values were computed from."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self.kept.append(leaf)
                self.sources[id(leaf)] = sources

    def hook(self, name: str) -> Callable[..., None]:
        """Return the forward hook of a layer."""

        def on_output(_: nn.Module, args: tuple, output: Any) -> None:
            if None in self.find_sources(args):
                self.after.add(name)
            if id(args[0]) in self.gelus:
                self.after_gelu.add(name)
            self.set_sources(output, {name})

        return on_output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        sources = self.find_sources((args, kwargs))
        if func in ACTIVATIONS:
            layers = {name for name in sources if name is not None}
            self.before |= layers
            sources.clear()
            sources |= {None} if layers else set()
        if sources:
            self.set_sources(output, sources)
            if func is F.gelu or (func is F.dropout and id(args[0]) in self.gelus):
                self.gelus.add(id(output))
        return output


def probe_module(module: nn.Module) -> ActivationNeighbours | None:
    """Run a module that reads a single tensor, and return the layers before and after activations.

    Returns:
        The names of the layers inside the module; None if it cannot be run in this way.
    """
    if not reads_one_tensor(module):
        return None
    probe: Any = copy_to_meta(module)
    layers = find_layers(probe)
    first: Any = next(iter(layers.values()))
    if isinstance(first, nn.Conv2d):
        shape = (1, first.in_channels, PROBE_SIZE, PROBE_SIZE)
    else:
        shape = (1, PROBE_SIZE, first.in_features)
    watcher = ActivationWatcher()
    for name, layer in layers.items():
        layer.register_forward_hook(watcher.hook(name))
    try:
        with watcher, torch.no_grad():
            probe(torch.empty(shape, dtype=first.weight.dtype, device="meta"))
    except Exception:  # whatever a module does with a tensor that it does not expect
        return None
    return ActivationNeighbours(watcher.before, watcher.after, watcher.after_gelu)


def reads_one_tensor(module: nn.Module) -> bool:
    """Return whether a module, which is no layer, has one parameter without a default value."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ModuleList | nn.ModuleDict):
        return False
    required = []
    for parameter in signature(module.forward).parameters.values():
        is_variable = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if parameter.default is Parameter.empty and not is_variable:
            required.append(parameter)
    return len(required) == 1
