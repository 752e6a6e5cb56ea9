"""Integer arithmetic in the quantized layers of a model that is otherwise simulated."""

from torch import nn

from fp4dit.packed.nn.backends import find_integer_operands
from fp4dit.packed.nn.gelu import use_gelu_kernel_
from fp4dit.packed.nn.kernels import find_kernels
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.packed.nn.token_quant import CachedFakeQuantize, find_token_grid
from fp4dit.quantization.apply import find_activation_slots
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from fp4dit.utils.errors import UserError


def use_integer_arithmetic_(model: nn.Module) -> int:
    """Pack the layers of a model on a CPU whose products are exact in whole numbers, in place.

    Their sums of products are then exact, where the simulation rounds sums of fp32. Other layers
    stay simulated, because their tokens or weights are no whole numbers times scales, or cannot be
    packed.

    Returns:
        The number of layers that compute in whole numbers: 0 if this machine has no kernels.

    Example:
        >>> load_quantized_(pipeline, weight, activation, weights_folder, activations_folder)
        >>> use_integer_arithmetic_(pipeline.transformer)
        60
    """
    count = 0
    for name, layer in list(model.named_modules()):
        packed = pack_if_exact(layer) if isinstance(layer, QuantLayer) else None
        if packed is not None:
            model.set_submodule(name, packed)
            count += 1
    if count:
        share_dynamic_quantizers_(model)
        use_gelu_kernel_(model)
    return count


def pack_if_exact(layer: QuantLayer) -> PackedLinear | None:
    """Return a packed copy of a layer; None if it cannot be packed, or its products are inexact."""
    if find_kernels() is None:
        return None
    if find_token_grid(layer.input_fake_quant, layer.reduction_size) is None:
        return None  # known without packing, which takes longer
    try:
        packed = pack_layer(layer)
    except UserError:  # a format of more than 8 bits, for example
        return None
    return packed if find_integer_operands(packed, packed.packed_buffers) else None


def share_dynamic_quantizers_(model: nn.Module) -> None:
    """Let equal dynamic quantizers of a model be one, which quantizes a tensor only once."""
    shared: dict[str, CachedFakeQuantize] = {}
    for slot in find_activation_slots(model).values():
        fake_quant = getattr(slot.owner, slot.attribute)
        if isinstance(fake_quant, FakeQuantize) and not fake_quant.static:
            quantizer = fake_quant.quantizer
            same = shared.setdefault(repr(quantizer), CachedFakeQuantize(quantizer))
            setattr(slot.owner, slot.attribute, same)
