"""Install quantizers in a model, in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp4dit.numerics.quantizer import PerInputChannel, PerTensor
from fp4dit.quantization.attention import QuantProcessor
from fp4dit.quantization.audit import check_bits
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer, QuantLinearBase
from fp4dit.quantization.observers import Observer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, find_rule, make_layer_by_rule
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import named_quant_layers
from fp4dit.utils.errors import UserError


def quantize_weights_(
    model: nn.Module,
    rules: Mapping[str, Rule],
    check: bool = True,
    context: TimestepContext | None = None,
) -> dict[str, QuantLayer]:
    """Replace layers by quantized ones, in place, and return these by name.

    Their weights are not rounded yet. `QuantLayer.prepare` and a rounding method do that later.

    Args:
        model: The transformer.
        rules: The rule of each layer that is to be quantized, by the name of the layer.
        check: Whether to check the weights for NaN and infinity. A model without weights needs
            False.
        context: The timestep context of the model, for rules with timestep ranges.

    Raises:
        UserError: if a weight holds NaN or infinity, or a rule does not fit a layer.
    """
    quantized_layers: dict[str, QuantLayer] = {}
    for name, rule in rules.items():
        if rule.quantizer is not None:
            layer = model.get_submodule(name)
            if check and not layer.weight.isfinite().all():  # pyright: ignore[reportCallIssue]
                raise UserError(
                    f"the weight of {name} holds NaN or infinity: the checkpoint is damaged"
                )
            quantized = make_layer_by_rule(name, layer, rule, context)
            model.set_submodule(name, quantized)
            quantized_layers |= named_quant_layers(name, quantized)
    return quantized_layers


@dataclass(frozen=True)
class ActivationSlot:
    """A place where an activation can be quantized: an attribute of a module.

    Attributes:
        owner: The module.
        attribute: The attribute that holds the activation quantizer.
        width: The number of values per token; per token and head for q, k and v.
        attention: The attention module that q, k or v belongs to; None for the input of a layer.
            Its modules `norm_q` and `norm_k`, if any, normalize q and k.

    Example:
        >>> slot = find_activation_slots(model)["transformer_blocks.0.attn1.q"]
        >>> rule = Rule("*", Quantizer(integer(8), PerToken()))
        >>> slot.install(FakeQuantize(rule.quantizer), rule)
    """

    owner: nn.Module
    attribute: str
    width: int
    attention: nn.Module | None = None

    def install(self, quantizer: FakeQuantize, rule: Rule) -> None:
        """Put the quantizer of a rule here, or before the norm of q or k if the rule says so."""
        norm_name = f"norm_{self.attribute}"
        norm = getattr(self.attention, norm_name, None)
        if rule.before_norm and norm is not None:
            setattr(self.attention, norm_name, nn.Sequential(quantizer, norm))
        else:
            setattr(self.owner, self.attribute, quantizer)
        if self.attention is not None and rule.attention is not None:
            self.owner.products = rule.attention  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def find_activation_slots(model: nn.Module) -> dict[str, ActivationSlot]:
    """Return a slot for each activation that can be quantized, by name.

    These are the inputs of quantized layers, and the q, k and v of attention.
    """
    slots = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinearBase):
            slots[name] = ActivationSlot(module, "input_fake_quant", module.reduction_size)
        processor: Any = getattr(module, "processor", None)
        if isinstance(processor, QuantProcessor):
            head_width: int = module.inner_dim // module.heads  # pyright: ignore[reportOperatorIssue, reportAssignmentType]
            for operand in "qkv":
                slots[f"{name}.{operand}"] = ActivationSlot(processor, operand, head_width, module)
    return slots


def quantize_activations_(
    model: nn.Module, rules: Sequence[Rule]
) -> tuple[dict[str, FakeQuantize], dict[str, Rule]]:
    """Insert activation quantizers into quantized layers and attention, in place.

    Returns:
        The activation quantizers by name, and the rule of each.

    Raises:
        UserError: if a rule is unused or has options that exclude each other, if no activation
            would be quantized, or if a granularity does not fit.
    """
    for module in list(model.modules()):
        if hasattr(module, "set_processor") and not isinstance(module.processor, QuantProcessor):
            module.set_processor(QuantProcessor(module.processor))  # pyright: ignore[reportCallIssue]
    slots, context = find_activation_slots(model), TimestepContext()
    context.attach(model)
    assigned = assign_rules(slots, rules)
    quantizers = {}
    for name, rule in assigned.items():
        quantizer = attach_activation_quantizer(name, slots[name], rule, context)
        if quantizer is not None:
            quantizers[name] = quantizer
    if rules and not quantizers:
        raise UserError(
            "no activation is quantized: give `activation` a rule with a quantizer, or use "
            "activation=none"
        )
    return quantizers, {name: assigned[name] for name in quantizers}


def quantize_inputs_(layers: Mapping[str, QuantLayer], rules: Sequence[Rule]) -> None:
    """Insert activation quantizers into some layers, in place. Rules may match none of them.

    Raises:
        UserError: if a rule has options that exclude each other, does not fit, or has scales for
            each timestep, because these layers do not know the timestep.
    """
    for name, layer in layers.items():
        rule = find_rule(name, rules)
        if rule is None:
            continue
        if rule.per_timestep:
            raise UserError(
                f"the activation rule {rule.match!r} has scales per timestep, and weights are "
                "rounded for all timesteps at once: choose activations without per_timestep, or "
                "do not quantize inputs meanwhile (quantize_inputs_while_rounding=null)"
            )
        slot = ActivationSlot(layer, "input_fake_quant", layer.reduction_size)
        attach_activation_quantizer(name, slot, rule, TimestepContext())


def attach_activation_quantizer(
    name: str, slot: ActivationSlot, rule: Rule, context: TimestepContext
) -> FakeQuantize | None:
    """Put the activation quantizer of a rule into a slot, and return it.

    Returns:
        The activation quantizer; None if the rule has no quantizer.

    Raises:
        UserError: if the rule has options that exclude each other, or its granularity does not fit.
    """
    if rule.quantizer is None:
        return None
    granularity = rule.quantizer.granularity
    if rule.observer and not isinstance(granularity, PerTensor | PerInputChannel):
        raise UserError(
            f"the activation rule {rule.match!r} is static, so its scales cannot follow tokens: it "
            "needs one scale per tensor (granularity: tensor) or per input channel (granularity: "
            "input_channel)"
        )
    if rule.per_timestep and not rule.observer:
        raise UserError(
            f"the activation rule {rule.match!r} has scales per timestep, so it must be static: "
            "give it an observer"
        )
    if rule.observer and isinstance(granularity, PerInputChannel):
        check_channel_scales(rule, rule.observer, slot.width)
    check_bits(name, rule.match, rule.quantizer, torch.Size([1, slot.width]))
    quantizer = rule.make_fake_quantize(context)
    slot.install(quantizer, rule)
    return quantizer


def check_channel_scales(rule: Rule, observer: Observer, width: int) -> None:
    """Check that the observer records what the scale rule needs for scales per input channel.

    The check calibrates a quantizer on a few tokens of zeros, and applies it to others.

    Raises:
        UserError: if the calibration or its application fails.
    """
    fake_quantize = FakeQuantize(rule.quantizer, static=True)  # pyright: ignore[reportArgumentType]
    try:
        fake_quantize.calibrate(observer.merge([observer.summarize(torch.zeros(2, width))]))
        fake_quantize(torch.zeros(3, width))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the activation rule {rule.match!r} asks for scales per input channel, and "
            f"{fake_quantize.quantizer.scale} does not compute them from what {observer} records: "
            "use observer: {kind: channel_range} and scale: {rule: pre_shift}, or choose "
            "granularity: tensor"
        ) from error


def check_activations(
    skeleton: nn.Module, weights: Sequence[Rule], activations: Sequence[Rule]
) -> None:
    """Check rules by quantizing a model without weights in place, before the real one is loaded.

    Raises:
        UserError: if `quantize_weights_` or `quantize_activations_` raises it.
    """
    quantize_weights_(skeleton, assign_rules(find_layers(skeleton), weights), check=False)
    quantize_activations_(skeleton, activations)
