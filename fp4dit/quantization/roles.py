"""Roles of layers: rules that name layers by what they do, for models whose names are not known.

A rule with the pattern `role:before_activation` is for the layers whose output an activation
function reads. `resolve_roles` replaces it by rules with the names of these layers.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.quantization.layers import check_quantizable
from fp4dit.quantization.rules import Rule, find_layers, find_rule
from fp4dit.utils.errors import UserError
from fp4dit.utils.modules import copy_to_meta

PREFIX = "role:"

# Layers and operands of attention whose rows the groups of their rule do not divide, or that cannot
# be quantized at all.
INDIVISIBLE = "role:indivisible"

# Layers inside a list of blocks that an activation function comes after, or before.
BEFORE_ACTIVATION, AFTER_ACTIVATION = "role:before_activation", "role:after_activation"

ACTIVATIONS = {F.gelu, F.silu, F.relu, F.mish, torch.relu, F.leaky_relu, F.elu}

ACTIVATION_NAME = re.compile("gelu|silu|swish|swiglu|geglu|relu|mish", re.IGNORECASE)

PROBE_SIZE = 4  # tokens, and pixels of a side


def has_roles(rules: Sequence[Rule] | None) -> bool:
    """Return whether a rule names its layers by their role."""
    return any(rule.match.startswith(PREFIX) for rule in rules or ())


def resolve_roles(rules: Sequence[Rule], model: nn.Module) -> list[Rule]:
    """Replace rules for roles by rules for the names of a model's layers.

    Args:
        rules: The rules, for weights or for activations.
        model: The model before it is quantized, possibly on the meta device.

    Raises:
        UserError: if there is an unknown role, or if no layer has the role of a rule that is not
            optional.

    Example:
        >>> rule = Rule("role:before_activation", quantizer)
        >>> [rule.match for rule in resolve_roles([rule], flux)]
        ['transformer_blocks.*.ff.net.0.proj', 'single_transformer_blocks.*.proj_mlp']
    """
    if not has_roles(rules):
        return list(rules)
    neighbours = find_activation_neighbours(model)
    expanded: list[Rule] = []
    for rule in rules:
        expanded += name_neighbours(rule, model, neighbours.get(rule.match), [])
    others = [rule for rule in expanded if rule.match != INDIVISIBLE]
    resolved: list[Rule] = []
    for rule in rules:
        if rule.match == INDIVISIBLE:
            resolved += [
                replace(rule, match=name, quantizer=quantizer)
                for name, quantizer in find_indivisible(model, rule, others)
                if find_rule(name, resolved) is None
            ]
        else:
            resolved += name_neighbours(rule, model, neighbours.get(rule.match), resolved)
    return resolved


def name_neighbours(
    rule: Rule, model: nn.Module, layers: Sequence[str] | None, earlier: Sequence[Rule]
) -> list[Rule]:
    """Return rules for the names of layers, without those that earlier rules are for.

    Args:
        rule: The rule.
        model: The model.
        layers: The layers that have the role of the rule; None if it is a rule for names.
        earlier: Rules that come before it.

    Raises:
        UserError: if there is no such role, or if no layer has it.
    """
    if layers is None:
        if rule.match.startswith(PREFIX) and rule.match != INDIVISIBLE:
            known = ", ".join((INDIVISIBLE, BEFORE_ACTIVATION, AFTER_ACTIVATION))
            raise UserError(f"{rule.match} is no role: there are {known}")
        return [rule]
    if not layers and not rule.optional:
        raise UserError(
            f"no layer of {type(model).__name__} was found for {rule.match}: name the layers that "
            "the preset means in model_layers.pre_gelu or model_layers.post_gelu, or give []"
        )
    free = [name for name in layers if find_rule(name, earlier) is None]
    return [replace(rule, match=match) for match in merge_names(free, list(find_layers(model)))]


def find_indivisible(
    model: nn.Module, rule: Rule, others: Sequence[Rule]
) -> Iterator[tuple[str, Quantizer | None]]:
    """Yield the layers and operands that their rule does not fit, and the quantizer they get.

    Args:
        model: The model.
        rule: The rule for what is indivisible.
        others: All other rules.

    Yields:
        The name, and the quantizer of `rule`; None for a layer that cannot be quantized at all.
    """
    layers = find_layers(model)
    for name, width in find_widths(model).items():
        other = find_rule(name, others)
        if other is None or other.quantizer is None:
            continue
        if name in layers and not is_quantizable(layers[name]):
            yield name, None
        elif not is_divisible(other, width):
            yield name, rule.quantizer


def is_quantizable(layer: nn.Module) -> bool:
    """Return whether there is a quantized layer for this one."""
    try:
        check_quantizable(layer)
    except ValueError:
        return False
    return True


def is_divisible(rule: Rule, width: int) -> bool:
    """Return whether the groups and the transforms of a rule fit rows of this many values."""
    assert rule.quantizer is not None
    try:
        rule.quantizer.granularity.width(torch.Size([1, width]))
        for spec in rule.transforms:
            spec(1, width)
    except ValueError:
        return False
    return True


def find_widths(model: nn.Module) -> dict[str, int]:
    """Return the values of a row of each layer, and of a head of each operand of attention."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            widths[name] = module.weight[0].numel()
        elif hasattr(module, "set_processor") and hasattr(module, "heads"):
            for operand in "qkv":
                widths[f"{name}.{operand}"] = module.inner_dim // module.heads  # pyright: ignore
    return widths


def merge_names(names: Sequence[str], all_names: Sequence[str]) -> Iterator[str]:
    """Yield patterns that match these names and no others: a wildcard for the number of a block."""
    remaining = dict.fromkeys(names)
    while remaining:
        name = next(iter(remaining))
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        matched = [other for other in all_names if fnmatchcase(other, pattern)]
        if not all(other in remaining for other in matched):
            pattern, matched = name, [name]
        for other in matched:
            del remaining[other]
        yield pattern


def find_activation_neighbours(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers before and after activation functions, by role, in the model's order.

    They are looked for inside the items of lists of modules, which are blocks. There each module
    that reads a single tensor runs on a small one without content. Modules that read several are
    not run: there the order of the layers and activation modules counts.
    """
    before: set[str] = set()
    after: set[str] = set()
    known: dict[Any, tuple[set[str], set[str]]] = {}
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
        for found, inner_names in zip((before, after), known[key], strict=True):
            found |= {f"{name}.{inner}" if inner else name for inner in inner_names}
    names = list(find_layers(model))
    return {
        BEFORE_ACTIVATION: [name for name in names if name in before],
        AFTER_ACTIVATION: [name for name in names if name in after],
    }


def compare_order(module: nn.Module) -> tuple[set[str], set[str]]:
    """Return the children before and after a child that is an activation function."""
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
    return before, after


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
        return output


def probe_module(module: nn.Module) -> tuple[set[str], set[str]] | None:
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
    return watcher.before, watcher.after


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
