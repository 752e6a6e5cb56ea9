"""Integer arithmetic in the quantized layers of a model that is otherwise simulated."""

from torch import nn

from fp4dit.packed.nn.backends import IntegerBackend
from fp4dit.packed.nn.integer_ops import find_kernels
from fp4dit.packed.nn.linear import pack_layer
from fp4dit.packed.nn.token_quant import CachedFakeQuantize, find_token_grid
from fp4dit.quantization.apply import find_activation_slots
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer


def use_integer_arithmetic_(model: nn.Module) -> int:
    """Pack the layers of a model on a CPU whose products are exact in whole numbers, in place.

    Their sums of products are then exact, where the simulation rounds sums of fp32. Other layers
    stay simulated, because their tokens or weights are no whole numbers times scales.

    Returns:
        The number of layers that compute in whole numbers: 0 if this machine has no kernels.

    Example:
        >>> load_quantized_(pipeline, weight, activation, weights_folder, activations_folder)
        >>> use_integer_arithmetic_(pipeline.transformer)
        60
    """
    if find_kernels() is None:
        return 0
    backend, count = IntegerBackend(), 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLayer) and not layer.weight.is_cuda:
            if find_token_grid(layer.input_fake_quant, layer.reduction_size) is None:
                continue
            packed = pack_layer(layer)
            if backend.find_operands(packed) is not None:
                model.set_submodule(name, packed)
                count += 1
    share_dynamic_quantizers_(model)
    return count


def share_dynamic_quantizers_(model: nn.Module) -> None:
    """Let equal dynamic quantizers of a model be one, which quantizes a tensor only once."""
    shared: dict[str, CachedFakeQuantize] = {}
    for slot in find_activation_slots(model).values():
        fake_quant = getattr(slot.owner, slot.attribute)
        if isinstance(fake_quant, FakeQuantize) and not fake_quant.static:
            quantizer = fake_quant.quantizer
            same = shared.setdefault(repr(quantizer), CachedFakeQuantize(quantizer))
            setattr(slot.owner, slot.attribute, same)
