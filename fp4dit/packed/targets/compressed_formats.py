"""NVFP4 and MXFP4 weights in the formats of compressed-tensors, which vLLM and transformers read.

Both formats keep the first of two codes in the low half of a byte, as fp4dit does
(`nvfp4/helpers.py` of compressed-tensors 0.20).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.block_scales import E4M3, E8M0Scale
from fp4dit.numerics.formats import floating
from fp4dit.numerics.qparams import Scale
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.packed.encoding.codes import encode_values, list_code_values
from fp4dit.packed.encoding.qparams import E8M0Encoding, add_neighbours
from fp4dit.packed.targets.grid import (
    GridWeight,
    make_format_index,
    require_format,
    require_scale,
    require_width,
)
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.utils.bitpack import pack_bits, unpack_bits
from fp4dit.utils.errors import UserError

E2M1 = floating(2, 1)

COMMON_ARGS = {"num_bits": 4, "type": "float", "symmetric": True}

# Quantizes inputs bit-exactly like the dynamic MXFP4 of compressed-tensors.
MXFP4_INPUTS = Quantizer(E2M1, PerGroup(32), E8M0Scale())


class CompressedFormat(ABC):
    """Format of a linear layer in compressed-tensors. `name` is its name there."""

    name: str

    @property
    @abstractmethod
    def weight_args(self) -> dict[str, Any]:
        """The `QuantizationArgs` of the weight."""

    @abstractmethod
    def describe_input(self, activation: nn.Module) -> dict[str, Any] | None:
        """Return the `QuantizationArgs` that quantize an input bit-exactly like `activation`.

        Returns:
            None if there are none.
        """

    @abstractmethod
    def encode(self, grid: GridWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a weight, by the suffix of their names.

        Raises:
            UserError: if readers would get another weight in `dtype`.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> GridWeight:
        """Return the weight that the tensors of `encode` hold.

        Raises:
            UserError: if the tensors do not have this format.
            KeyError: if a tensor is missing.
        """


@dataclass(frozen=True)
class CompressedNVFP4(CompressedFormat):
    """E2M1 in blocks of 16 with E4M3 scales, which are divided by one fp32 number.

    In fp4dit they are multiplied by one fp32 number.

    Example:
        >>> CompressedNVFP4().encode(packed_layer).keys()
        dict_keys(['weight_packed', 'weight_scale', 'weight_global_scale'])
    """

    name: str = "nvfp4-pack-quantized"

    @property
    def weight_args(self) -> dict[str, Any]:
        return COMMON_ARGS | {
            "strategy": "tensor_group",
            "group_size": 16,
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn",
        }

    def describe_input(self, activation: nn.Module) -> dict[str, Any] | None:
        """Return None: compressed-tensors has one fp32 scale for all calls, or none.

        In fp4dit every call has its own.
        """
        return None

    def encode(self, grid: GridWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        codes, scales = encode_e2m1(grid, 16)
        divisor = find_common_divisor(scales.unique(), dtype)
        return {
            "weight_packed": codes,
            "weight_scale": E4M3.nearest(scales * divisor).to(torch.float8_e4m3fn),
            "weight_global_scale": divisor,
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> GridWeight:
        codes, scale = tensors["weight_packed"], tensors["weight_scale"]
        divisor = tensors["weight_global_scale"]
        if (codes.dtype, scale.dtype, divisor.numel()) != (torch.uint8, torch.float8_e4m3fn, 1):
            raise UserError("it is not of uint8, float8_e4m3fn, and one number for all")
        return decode_e2m1(codes, scale.float() / divisor.float(), 16)


@dataclass(frozen=True)
class CompressedMXFP4(CompressedFormat):
    """E2M1 in blocks of 32 with powers of two as scales, stored as exponents.

    Example:
        >>> CompressedMXFP4().encode(packed_layer).keys()
        dict_keys(['weight_packed', 'weight_scale'])
    """

    name: str = "mxfp4-pack-quantized"

    @property
    def weight_args(self) -> dict[str, Any]:
        return self.quantization_args(dynamic=False)

    def quantization_args(self, dynamic: bool) -> dict[str, Any]:
        """Return the `QuantizationArgs` of weights or of dynamic inputs."""
        return COMMON_ARGS | {
            "strategy": "group",
            "group_size": 32,
            "dynamic": dynamic,
            "scale_dtype": "torch.uint8",
        }

    def describe_input(self, activation: nn.Module) -> dict[str, Any] | None:
        if not isinstance(activation, FakeQuantize) or activation.static:
            return None
        if activation.quantizer != MXFP4_INPUTS:
            return None
        return self.quantization_args(dynamic=True)

    def encode(self, grid: GridWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        codes, scales = encode_e2m1(grid, 32)
        return {"weight_packed": codes, "weight_scale": encode_powers_of_two(scales)}

    def decode(self, tensors: Mapping[str, Tensor]) -> GridWeight:
        codes, scale = tensors["weight_packed"], tensors["weight_scale"]
        if (codes.dtype, scale.dtype) != (torch.uint8, torch.uint8):
            raise UserError("it is not of uint8")
        return decode_e2m1(codes, decode_powers_of_two(scale), 32)


FORMATS: tuple[CompressedNVFP4, CompressedMXFP4] = (CompressedNVFP4(), CompressedMXFP4())


def encode_e2m1(grid: GridWeight, width: int) -> tuple[UInt8[Tensor, "o b"], Float[Tensor, "o n"]]:
    """Return the packed codes of an E2M1 weight, the first of two in the low half, and its scales.

    Raises:
        UserError: if it has another format, zero points, or other blocks.
    """
    require_format(grid, E2M1)
    require_width(grid, (width,))
    scales = grid.by_row(require_scale(grid)).cpu()
    return pack_bits(encode_values(grid.points.cpu(), list_code_values(E2M1)), 4), scales


def decode_e2m1(
    codes: UInt8[Tensor, "o b"], scales: Float[Tensor, "rows n"], width: int
) -> GridWeight:
    """Return the weight of packed E2M1 codes and scales.

    Raises:
        UserError: if there is not one scale for each block.
    """
    if codes.ndim != 2 or scales.shape != (len(codes), codes.shape[1] * 2 // width):
        raise UserError(
            f"there are scales {list(scales.shape)} for codes {list(codes.shape)} in blocks of "
            f"{width}"
        )
    points = list_code_values(E2M1)[unpack_bits(codes, 4, codes.shape[1] * 2).int()]
    return GridWeight(E2M1, points, Scale(scales.reshape(-1, 1)), width)


def encode_powers_of_two(scales: Float[Tensor, "o n"]) -> UInt8[Tensor, "o n"]:
    """Return the exponents of powers of two as E8M0 codes.

    Raises:
        UserError: if a scale is not a power of two.
    """
    parts = E8M0Encoding(False).encode(scales.flatten(), make_format_index(scales.numel()))
    if parts is None:
        raise UserError("its scales are not powers of two: use weight.scale.rule=e8m0")
    return parts[""].view(scales.shape)


def decode_powers_of_two(codes: UInt8[Tensor, "o n"]) -> Float[Tensor, "o n"]:
    """Return powers of two. The code 255, which is NaN in E8M0, gives infinity."""
    flat = codes.flatten()
    powers = E8M0Encoding(False).decode({"": flat}, make_format_index(len(flat)))
    return powers.view(codes.shape)


def find_common_divisor(scales: Float[Tensor, "s"], dtype: torch.dtype) -> Float[Tensor, "1"]:
    """Return a divisor d so that each scale equals e / d for an E4M3 number e.

    fp4dit computes a scale as a product, and readers of compressed-tensors as a quotient. The two
    seldom round alike in the last bit of fp32. The requirement is therefore that the weight, every
    value of E2M1 times every scale, is equal in `dtype`, the dtype that the layer computes in. No
    divisor meets it if a weight from the product lies halfway between two numbers of bf16 or fp16,
    and the weight from the quotient beside it. This happens to about one in a hundred layers whose
    weights had 16 bits.

    Args:
        scales: ascending scales without repetition.

    Raises:
        UserError: if there is no such divisor.
    """
    e4m3_values = E4M3.values().flip(0).to(scales)
    if len(scales) > 126 or not scales[0] > 0:
        raise UserError("its scales are not numbers of E4M3 times one fp32 number")
    # The largest scale times the divisor must be one of the 126 positive values of E4M3.
    quotient = e4m3_values[e4m3_values > 0] / scales[-1]
    divisors = add_neighbours(quotient)  # all are tried, because the quotient is rounded
    e4m3_scales = E4M3.nearest(scales * divisors)
    values = list_code_values(E2M1)[:8].to(scales)
    weights = ((e4m3_scales / divisors)[..., None] * values).to(dtype)
    equal = (weights == (scales[:, None] * values).to(dtype)).all(2).all(1)
    if not equal.any():
        raise UserError(
            f"its scales are not, as {dtype} rounds the weight, numbers of E4M3 divided by one "
            "fp32 number. NVFP4's nearly always are as bfloat16 and float16 round it"
        )
    return divisors[equal][0]
