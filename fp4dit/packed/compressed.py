"""Weights as compressed-tensors keeps them, which vLLM and transformers read: NVFP4 and MXFP4.

Both take the first of two codes from the low half of a byte, as we do (`nvfp4/helpers.py` of 0.20).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.blockscales import E4M3, E8M0
from fp4dit.errors import UserError
from fp4dit.formats import floating
from fp4dit.grid import Grid
from fp4dit.packed.codes import levels
from fp4dit.packed.interchange import block_scales, laid_out, one_kind
from fp4dit.packed.layer import PackedLinear
from fp4dit.packed.layout import Held, Layout
from fp4dit.packed.numbers import Powers
from fp4dit.quantizer import Granularity, Quantizer

E2M1 = floating(2, 1)
ARGUMENTS = {"num_bits": 4, "type": "float", "symmetric": True}
MXFP4_INPUTS = Quantizer(E2M1, Granularity("group", 32), E8M0())


@dataclass(frozen=True)
class NVFP4:
    """E2M1 in blocks of 16. A scale is an E4M3 number divided by one fp32 number, where ours is a product."""

    name: str = "nvfp4-pack-quantized"

    @property
    def weights(self) -> dict[str, Any]:
        own = {"strategy": "tensor_group", "group_size": 16, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
        return ARGUMENTS | own

    def inputs(self, activation: nn.Module) -> dict[str, Any] | None:
        """Nothing: theirs have one fp32 scale for all calls, or none, and ours one for each call."""
        return None

    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        scales, shape = block_scales(layer, E2M1, 16), (layer.out_features, -1)
        divisor = common_divisor(scales.unique(), layer.dtype)
        return {
            "weight_packed": layer.held["codes"],
            "weight_scale": E4M3.nearest(scales * divisor).to(torch.float8_e4m3fn).view(shape),
            "weight_global_scale": divisor,
        }

    def read(self, kept: Mapping[str, Tensor]) -> tuple[Layout, Held]:
        packed, scale, divisor = (kept[name] for name in ("weight_packed", "weight_scale", "weight_global_scale"))
        if (packed.dtype, scale.dtype, divisor.numel()) != (torch.uint8, torch.float8_e4m3fn, 1):
            raise UserError("it is not of uint8, float8_e4m3fn, and one number for all")
        return laid_out(packed, E2M1, 16, scale.float() / divisor.float())


@dataclass(frozen=True)
class MXFP4:
    """E2M1 in blocks of 32, with the exponents of powers of two as scales."""

    name: str = "mxfp4-pack-quantized"

    @property
    def weights(self) -> dict[str, Any]:
        return self.arguments(dynamic=False)

    def arguments(self, dynamic: bool) -> dict[str, Any]:
        own = {"strategy": "group", "group_size": 32, "dynamic": dynamic, "scale_dtype": "torch.uint8"}
        return ARGUMENTS | own

    def inputs(self, activation: nn.Module) -> dict[str, Any] | None:
        online = isinstance(activation, Grid) and not activation.static
        return self.arguments(dynamic=True) if online and activation.quantizer == MXFP4_INPUTS else None

    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        scales = block_scales(layer, E2M1, 32).cpu()
        parts = Powers(False).encode(scales, one_kind(len(scales)))
        if parts is None:
            raise UserError("its scales are not powers of two")
        return {"weight_packed": layer.held["codes"], "weight_scale": parts[""].view(layer.out_features, -1)}

    def read(self, kept: Mapping[str, Tensor]) -> tuple[Layout, Held]:
        packed, scale = kept["weight_packed"], kept["weight_scale"]
        if (packed.dtype, scale.dtype) != (torch.uint8, torch.uint8):
            raise UserError("it is not of uint8")
        exponents = scale.int() - 127  # 128, which is NaN, becomes infinite
        return laid_out(packed, E2M1, 32, torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents))


FORMATS = (NVFP4(), MXFP4())


def common_divisor(scales: Float[Tensor, "s"], dtype: torch.dtype) -> Float[Tensor, "1"]:
    """A number by which numbers of E4M3 are divided to give these scales, ascending, as fp32 rounds the quotients.

    Quotients seldom round as products do, in the last bit of fp32. What must be equal is the weight as the layer
    computes with it, in `dtype`: every value of E2M1 times every scale. In bf16 and fp16 a product can lie halfway
    between two numbers, and the quotient beside it: for about one in a hundred layers that had weights of 16 bits.

    Raises:
        UserError: if there is no such number.
    """
    codes = E4M3.values().flip(0).to(scales)
    if len(scales) > 126 or not scales[0] > 0:
        raise UserError("its scales are not numbers of E4M3 times one fp32 number")
    quotient = codes[codes > 0] / scales[-1]
    around = [quotient.nextafter(quotient * 0), quotient, quotient.nextafter(quotient * 2)]
    divisors = torch.stack(around, 1).view(-1, 1)
    numbers = E4M3.nearest(scales * divisors)
    values = levels(E2M1)[:8].to(scales)
    theirs = ((numbers / divisors)[..., None] * values).to(dtype)
    equal = (theirs == (scales[:, None] * values).to(dtype)).all(2).all(1)
    if not equal.any():
        raise UserError(
            f"its scales are not, as {dtype} rounds the weight, numbers of E4M3 divided by one fp32 number. NVFP4's "
            "nearly always are as bfloat16 and float16 round it"
        )
    return divisors[equal][0]
