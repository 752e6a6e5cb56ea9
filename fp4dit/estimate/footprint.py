"""Measure the operations, memory and activation shapes of a model per sample, without its weights.

Models are on the meta device, where tensors have shapes and no data.
"""

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import ReadOnlyState, split_by_unit
from fp4dit.quantization.apply import (
    find_activation_slots,
    quantize_activations_,
    quantize_weights_,
)
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, match_rules
from fp4dit.utils.calls import Call


@dataclass(frozen=True)
class UnitFootprint:
    """The resources of one sample in one unit.

    Attributes:
        unit: The name of the unit.
        inputs: The names of the activations that the unit reads.
        flops: The number of operations. A multiplication and an addition count as two.
        peak_bytes: The largest size of all intermediate results at one time.
        saved_bytes: The size of the intermediate results that are saved for the backward pass.
        output_bytes: The size of each output of the unit.
        layers: The layers to quantize.
    """

    unit: str
    inputs: Sequence[str]
    flops: int
    peak_bytes: int
    saved_bytes: int
    output_bytes: Mapping[str, int]
    layers: Sequence[QuantLayer]


@dataclass(frozen=True)
class ModelFootprint:
    """The resources of one sample in a model.

    Attributes:
        input_bytes: The size of each activation of a captured call.
        units: The resources of each unit.
        activation_shapes: The shape of every activation that can be quantized, by the names of
            `quantization.apply.find_activation_slots`.
        parameter_bytes: The size of the weights.
        flops: The number of operations of all units.
        peak_bytes: The largest size of the intermediate results of a unit at one time.

    Example:
        >>> source = PixArt("PixArt-alpha/PixArt-XL-2-1024-MS")
        >>> footprint = measure_footprint(source.build_on_meta())
        >>> footprint.activation_shapes["transformer_blocks.0.attn1.q"]
        torch.Size([1, 16, 4096, 72])
    """

    input_bytes: Mapping[str, int]
    units: Sequence[UnitFootprint]
    activation_shapes: Mapping[str, torch.Size]
    parameter_bytes: int

    @property
    def flops(self) -> int:
        return sum(unit.flops for unit in self.units)

    @property
    def peak_bytes(self) -> int:
        return max(unit.peak_bytes for unit in self.units)


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create inside the `with` statement.

    Attributes:
        live_bytes: The size of the tensors that exist now.
        peak_bytes: The largest size at any time.

    Example:
        >>> with MemoryTracker() as memory:
        ...     y = torch.empty(1000, device="meta") + 1
        >>> memory.live_bytes
        4000
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ):
        self.known |= collect_storages((args, kwargs))
        output = func(*args, **(kwargs or {}))
        for storage in collect_storages(output):
            if storage not in self.known:  # the storage of a view is known
                self.known.add(storage)
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self.subtract, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return output

    def subtract(self, size: int) -> None:
        self.live_bytes -= size


def collect_storages(values: Any) -> set[torch.UntypedStorage]:
    """Return the storages of all tensors in nested lists, tuples and dictionaries."""
    return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)}


class FusedAttention(TorchFunctionMode):
    """Runs attention as the fused kernels of CPUs and GPUs do, inside the `with` statement.

    Without it, attention on the meta device creates the matrix of attention weights.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ):
        options = dict(kwargs or {})
        names = ("query", "key", "value", "attn_mask")
        arguments = dict(zip(names, args, strict=False)) | options
        if func is not F.scaled_dot_product_attention or not arguments["query"].is_meta:
            return func(*args, **options)
        operands = (arguments.get(name) for name in names)
        return torch.ops.aten._scaled_dot_product_efficient_attention(*operands, True)[0]


def measure_footprint(pipeline: Pipeline, weight: Sequence[Rule] = ()) -> ModelFootprint:
    """Measure a pipeline on the meta device.

    The cost of transforms and quantizers is not counted.

    Args:
        pipeline: A pipeline on the meta device. Layers are replaced by quantized ones in place.
        weight: The rules for weights.
    """
    call = pipeline.meta_call(1)
    model = pipeline.transformer
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    layers = insert_plain_layers_(model, weight)
    shapes = record_activation_shapes(model)
    state = pipeline.initial_state(call)
    input_bytes = count_bytes(state)
    units: list[UnitFootprint] = []
    costs: dict[Hashable, tuple[int, int, int]] = {}
    all_units = pipeline.units()
    for unit, unit_layers in zip(all_units, split_by_unit(layers, all_units), strict=True):
        call, module = unit.make_call(state), model.get_submodule(unit.module)
        key = describe_call(module, call)
        if key not in costs:  # a model has many blocks of one kind
            costs[key] = (*measure_forward(module, call), measure_saved_bytes(module, call))
        values = unit.read_outputs(call(module), 1)
        outputs = dict(zip(unit.outputs, values, strict=True))
        output_bytes = count_bytes(outputs)
        footprint = *costs[key], output_bytes, list(unit_layers.values())
        units.append(UnitFootprint(unit.module, unit.inputs, *footprint))
        state = state | outputs
    return ModelFootprint(input_bytes, units, shapes, parameter_bytes)


def insert_plain_layers_(model: nn.Module, weight: Sequence[Rule]) -> dict[str, QuantLayer]:
    """Replace the layers of a model by quantized ones without transforms, in place."""
    plain_rules = [replace(rule, transforms=(), timestep_boundaries=()) for rule in weight]
    rules = assign_rules(find_layers(model), plain_rules)
    return quantize_weights_(model, rules, check=False)


def measure_activation_shapes(
    pipeline: Pipeline, weight: Sequence[Rule]
) -> Mapping[str, torch.Size]:
    """Return the shape of every activation that can be quantized, for one sample.

    Args:
        pipeline: A pipeline on the meta device. Layers are replaced by quantized ones in place.
        weight: The rules for weights.
    """
    call = pipeline.meta_call(1)  # first, because the model may be replaced by one with weights
    insert_plain_layers_(pipeline.transformer, weight)
    shapes = record_activation_shapes(pipeline.transformer)
    with torch.no_grad():
        call(pipeline.transformer)
    return shapes


def record_activation_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return a dictionary that the next forward pass fills with the shapes of all activations."""
    quantize_activations_(model, [])  # inserts modules that receive q, k and v of attention
    shapes: dict[str, torch.Size] = {}

    def hook(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes[name] = args[0].shape

    for name, slot in find_activation_slots(model).items():
        getattr(slot.owner, slot.attribute).register_forward_pre_hook(partial(hook, name))
    return shapes


def count_bit_operations(
    pipeline: Pipeline, weight: Sequence[Rule], activation: Sequence[Rule]
) -> int | float:
    """Count the multiplications of one forward pass, each times the bits of both operands.

    The operands of quantized layers count with the bits of their formats, without scales. All other
    operands, such as those of attention, count with 16 bits.

    Args:
        pipeline: A pipeline on the meta device, for one sample.
        weight: The rules for weights.
        activation: The rules for activations.
    """
    footprint = measure_footprint(pipeline, weight)
    shapes = footprint.activation_shapes
    input_rules = match_rules(shapes, activation)
    total, other_products = 0, footprint.flops // 2
    for name, layer in pipeline.transformer.named_modules():
        if not isinstance(layer, QuantLayer) or name not in shapes:
            continue
        quantizer = input_rules[name].quantizer if name in input_rules else None
        input_bits = quantizer.format.bits if quantizer else 16
        products = len(layer.weight_matrix) * shapes[name].numel()
        total += products * layer.weight_fake_quant.quantizer.format.bits * input_bits
        other_products -= products
    return total + 16 * 16 * other_products


def count_bytes(state: ReadOnlyState) -> dict[str, int]:
    """Return the size of each tensor."""
    return {name: value.nbytes for name, value in state.items()}


def describe_call(module: nn.Module, call: Call) -> Hashable:
    """Return the properties that the cost of a call depends on: the class and all shapes."""
    parameters = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
    arguments = []
    for value in tree_leaves((call.args, call.kwargs)):
        arguments.append(value.shape if isinstance(value, Tensor) else type(value))
    return type(module), parameters, tuple(arguments)


@torch.no_grad()
def measure_forward(module: nn.Module, call: Call) -> tuple[int, int]:
    """Return the operations and the peak bytes of a forward pass."""
    with FlopCounterMode(display=False) as counter, FusedAttention(), MemoryTracker() as memory:
        call(module)
    return counter.get_total_flops(), memory.peak_bytes


def measure_saved_bytes(module: nn.Module, call: Call) -> int:
    """Return the bytes that a forward pass saves for the gradients of the weights."""
    module.requires_grad_(True)
    with FusedAttention(), MemoryTracker() as memory:
        # The bytes are read while the output exists, because its graph holds the saved tensors.
        _output, saved = call(module), memory.live_bytes
    module.requires_grad_(False)
    return saved
