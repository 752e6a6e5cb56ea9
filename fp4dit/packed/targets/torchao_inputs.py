"""The inputs of torchao's MX layers, which its readers quantize in blocks of 32.

Its four modes of scaling are four exponent rules here, with the same bits.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fp4dit.numerics.block_scales import (
    CeilRatioExponent,
    E8M0Scale,
    ceil_exponent,
    even_exponent,
    floor_exponent,
)
from fp4dit.numerics.formats import floating
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.utils.errors import UserError

MODES = {
    "EVEN": E8M0Scale(even_exponent),
    "FLOOR": E8M0Scale(floor_exponent),
    "CEIL": E8M0Scale(ceil_exponent),
    "RCEIL": E8M0Scale(CeilRatioExponent()),
}

ELEMENTS = {
    "float8_e4m3fn": floating(4, 3, reserved=1),
    "float4_e2m1fn_x2": floating(2, 1),
}


def describe_inputs(module: nn.Module, kernels: str) -> tuple[dict[str, Any], bool]:
    """Return the attributes with which readers quantize an input, and whether it is as here.

    Inputs that are quantized otherwise here, or not at all, become MXFP8.
    """
    is_dynamic = isinstance(module, FakeQuantize) and not module.static
    for element in ELEMENTS if is_dynamic else ():
        for mode in MODES:
            attributes = make_attributes(element, mode, kernels)
            if module.quantizer == read_input_quantizer(attributes):
                return attributes, True
    return make_attributes("float8_e4m3fn", "EVEN", kernels), False


def make_attributes(element: str, mode: str, kernels: str) -> dict[str, Any]:
    """Return the attributes of an input in the JSON of torchao."""
    data = {
        "elem_dtype": {"_type": "torch.dtype", "_data": element},
        "block_size": 32,
        "scaling_mode": {"_type": "ScaleCalculationMode", "_data": mode},
        "kernel_preference": {"_type": "KernelPreference", "_data": kernels},
        "is_swizzled_scales": False,
    }
    return {"_type": "QuantizeTensorToMXKwargs", "_data": data}


def read_input_quantizer(attributes: Mapping[str, Any]) -> Quantizer:
    """Return the quantizer of inputs with these attributes.

    Raises:
        UserError: if there is none.
    """
    data = attributes["_data"]
    element, mode = data["elem_dtype"]["_data"], data["scaling_mode"]["_data"]
    if element not in ELEMENTS or mode not in MODES or data["block_size"] != 32:
        raise UserError(f"inputs in {element} of mode {mode} have no counterpart here")
    return Quantizer(ELEMENTS[element], PerGroup(32), MODES[mode])
