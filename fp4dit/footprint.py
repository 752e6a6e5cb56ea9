"""What one sample takes on its way through a model, from shapes alone: the model may be on the meta device."""

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fp4dit import policy
from fp4dit.calls import Call
from fp4dit.layer import QuantLayer
from fp4dit.models.base import Pipeline
from fp4dit.policy import Rule
from fp4dit.stream import Rows, answers, within


@dataclass(frozen=True)
class Pass:
    """One sample's way through one unit. A multiplication and an addition are two `flops`.

    What is in bytes: the most that intermediate results take at one time, what is `kept` of them for a gradient,
    and each column of the state that the unit leaves. `reads` names the columns it is called with, `layers` are those
    to be quantized.
    """

    unit: str
    reads: Sequence[str]
    flops: int
    widest: int
    kept: int
    left: Mapping[str, int]
    layers: Sequence[QuantLayer]


@dataclass(frozen=True)
class Work:
    """What fitting a unit takes besides the passes that advance the models: arithmetic, and bytes where it is done."""

    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Footprint:
    """One sample's way through a model.

    `given` has the bytes of each column of a captured call, `seen` the shape of everything that can be quantized while
    it flows, by the names of `policy.places`, and `parameters` the bytes of the weights.
    """

    given: Mapping[str, int]
    passes: Sequence[Pass]
    seen: Mapping[str, torch.Size]
    parameters: int

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.passes)

    @property
    def widest(self) -> int:
        return max(one.widest for one in self.passes)


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block: those `alive` now, and the `most` at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        self.known |= storages((args, kwargs))
        answer = func(*args, **(kwargs or {}))
        for storage in storages(answer):
            if storage not in self.known:  # as a view's is
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.alive)
        return answer

    def free(self, size: int) -> None:
        self.alive -= size


def storages(values: Any) -> set[torch.UntypedStorage]:
    return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)}


class Fused(TorchFunctionMode):
    """Attention as the kernels of CPUs and GPUs compute it. On the meta device its matrix of weights would be made."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        given = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        names = ("query", "key", "value", "attn_mask")
        found = dict(zip(names, args, strict=False)) | given
        operands = (found.get(name) for name in names)
        return torch.ops.aten._scaled_dot_product_efficient_attention(*operands, True)[0]


def footprint(pipeline: Pipeline, weight: Sequence[Rule] = ()) -> Footprint:
    """Of a pipeline on the meta device. Its layers that `weight` names are wrapped, in place, to see what enters them.

    What transforms cost, and quantizing, is not counted.
    """
    dit = pipeline.dit
    parameters = sum(p.nbytes for p in dit.parameters())
    plain = [replace(rule, transforms=(), ranges=()) for rule in weight]
    layers = policy.quantize_weights_(dit, policy.assign(policy.layers(dit), plain), check=False)
    policy.quantize_activations_(dit, [])  # so that attention's operands are seen
    seen: dict[str, torch.Size] = {}
    for name, place in policy.places(dit).items():
        note = lambda _m, given, name=name: seen.update({name: given[0].shape})
        getattr(place.owner, place.attribute).register_forward_pre_hook(note)
    state, passes = pipeline.begin(pipeline.blank(1)), []
    given = sizes(state)
    known: dict[Hashable, tuple[int, int, int]] = {}
    for unit in pipeline.units():
        call, module = unit.call(state), dit.get_submodule(unit.module)
        own = kind(module, call)
        known[own] = known.get(own) or (*measured(module, call), kept(module, call))  # one of many blocks will do
        left = dict(zip(unit.answer, answers(call(module)), strict=True))
        passes.append(Pass(unit.module, unit.reads, *known[own], sizes(left), list(within(layers, unit).values())))
        state = state | left
    return Footprint(given, passes, seen, parameters)


def bit_operations(pipeline: Pipeline, weight: Sequence[Rule], activation: Sequence[Rule]) -> int | float:
    """Multiplications of one call for a sample, each times the bits of both sides: of layers at the bits of their
    formats, without scales; of all else, attention's products among it, at 16. The pipeline is on the meta device.
    """
    own = footprint(pipeline, weight)
    found = {name: module for name, module in pipeline.dit.named_modules() if isinstance(module, QuantLayer)}
    layers = {name: layer for name, layer in found.items() if name in own.seen}
    inputs = policy.matched(own.seen, activation)
    products = {name: len(layer.rows) * own.seen[name].numel() for name, layer in layers.items()}
    entering = {name: rule.quantizer.format.bits for name, rule in inputs.items() if rule.quantizer}
    sides = {name: layer.grid.quantizer.format.bits * entering.get(name, 16) for name, layer in layers.items()}
    rest = own.flops // 2 - sum(products.values())
    return sum(products[name] * sides[name] for name in layers) + 16 * 16 * rest


def sizes(rows: Rows) -> dict[str, int]:
    return {name: value.nbytes for name, value in rows.items()}


def kind(module: nn.Module, call: Call) -> Hashable:
    """What a module's operations depend on: its kind, and the shapes of its parameters and of what it is given."""
    parameters = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
    given = tuple(x.shape if isinstance(x, Tensor) else type(x) for x in tree_leaves((call.args, call.kwargs)))
    return type(module), parameters, given


@torch.no_grad()
def measured(module: nn.Module, call: Call) -> tuple[int, int]:
    """The operations, and the most bytes at one time."""
    with FlopCounterMode(display=False) as counter, Fused(), Memory() as memory:
        call(module)
    return counter.get_total_flops(), memory.most


def kept(module: nn.Module, call: Call) -> int:
    """What is alive after a call whose gradient with respect to the weights is wanted."""
    module.requires_grad_(True)
    with Fused(), Memory() as memory:
        _, alive = call(module), memory.alive  # while the answer is there, which holds it
    module.requires_grad_(False)
    return alive
