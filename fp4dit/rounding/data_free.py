"""Tell whether a model can be quantized without data, from its weights alone."""

from collections.abc import Iterator, Sequence

from fp4dit.quantization.rules import Rule
from fp4dit.rounding.base import RoundingMethod


def explain_data_need(
    weight: Sequence[Rule], activation: Sequence[Rule], rounding: RoundingMethod
) -> str | None:
    """Return why a model cannot be quantized without calibration calls, or None if it can.

    Rules without a quantizer need nothing. Whether activations are quantized while weights are
    rounded does not matter, because a rounding that reads no inputs ignores them.

    Args:
        weight: The rules for weights.
        activation: The rules for activations.
        rounding: The method that rounds the weights.

    Returns:
        A clause that can follow "because".

    Example:
        >>> explain_data_need(weight, activation, GPTQ())
        'weights are rounded by GPTQ, which reads the inputs of the layers'
    """
    return next(_iter_needs(weight, activation, rounding), None)


def _iter_needs(
    weight: Sequence[Rule], activation: Sequence[Rule], rounding: RoundingMethod
) -> Iterator[str]:
    """Yield each part that reads the inputs of layers."""
    if rounding.elementwise_rounding is None:
        name = type(rounding).__name__
        yield f"weights are rounded by {name}, which reads the inputs of the layers"
    for rule in weight:
        for spec in rule.transforms:
            if rule.quantizer and getattr(spec, "needs_inputs", True):
                yield f"{type(spec).__name__} is fitted to the inputs of the layers"
    for rule in activation:
        if rule.quantizer and rule.observer:
            yield f"the activation rule {rule.match!r} has static scales, which are calibrated"
