"""torchao's tensors for block formats (torchao.prototype.mx_formats of 0.18), which is imported once one is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from fp4dit.blockscales import E4M3, E8M0, ceil, even, floor
from fp4dit.errors import UserError
from fp4dit.formats import NumberFormat, floating
from fp4dit.grid import Grid
from fp4dit.packed import bits
from fp4dit.packed.interchange import block_scales, filled, laid_out, one_kind
from fp4dit.packed.layer import PackedLinear
from fp4dit.packed.layout import Held, Layout
from fp4dit.packed.numbers import Eighths, Powers
from fp4dit.quantizer import Granularity, Quantizer

E2M1 = floating(2, 1)
# What torchao calls the formats: bytes of two codes, bytes of one code, and floats.
ELEMENTS: dict[NumberFormat, torch.dtype | str] = {
    E2M1: torch.float4_e2m1fn_x2,
    floating(2, 3): "fp6_e2m3",
    floating(3, 2): "fp6_e3m2",
    E4M3: torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class NVFP4:
    """`NVFP4Tensor`: E2M1 in blocks of 16, E4M3 scales, and one fp32 scale that it multiplies them by as we do."""

    name: str = "NVFP4Tensor"

    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        scales = block_scales(layer, E2M1, 16).cpu()
        parts = Eighths(1).encode(scales, one_kind(len(scales)))
        if parts is None:
            raise UserError("its scales are not numbers of E4M3 times one fp32 number")
        codes, rows = layer.held["codes"], layer.out_features
        scale = parts[""].view(torch.float8_e4m3fn).view(rows, -1).to(codes.device)
        factor = parts["factor"].view(torch.float32)[0].to(codes.device)
        return {"weight": checked(NVFP4Tensor(codes.clone(), scale, 16, layer.dtype, factor), layer)}

    def inputs(self, activation: nn.Module) -> None:
        """Nothing: torchao multiplies by reciprocals where we divide, which rounds otherwise."""

    def activation(self, inputs: Any) -> Grid:
        raise UserError(
            "torchao quantizes its input to NVFP4, and not to the bit as any rule here: set act_quant_kwargs of the "
            "weight to None, and give the layer an activation rule instead"
        )

    def read(self, kept: Mapping[str, Tensor]) -> tuple[Layout, Held]:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        weight = expected(kept["weight"], NVFP4Tensor)
        scales = weight.get_hp_scales().view(len(weight.qdata), -1)
        return laid_out(weight.qdata.view(torch.uint8), E2M1, 16, scales)


@dataclass(frozen=True)
class MX:
    """`MXTensor`: one of the formats of OCP MX 1.0 in blocks of 32, and powers of two as scales."""

    format: NumberFormat = E2M1
    name: str = "MXTensor"

    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.quantization.quantize_.common import KernelPreference

        scales = block_scales(layer, self.format, 32).cpu()
        parts = Powers(False).encode(scales, one_kind(len(scales)))
        if parts is None:
            raise UserError("its scales are not powers of two")
        data = self.data(layer.held["codes"], layer.in_features)
        scale = parts[""].view(torch.float8_e8m0fnu).view(layer.out_features, -1).to(data.device)
        emulated, element = KernelPreference.EMULATED, ELEMENTS[self.format]
        return {"weight": checked(MXTensor(data, scale, element, 32, layer.dtype, emulated, None, False), layer)}

    def inputs(self, activation: nn.Module) -> Any | None:
        """Online scales of powers of two, by the rules that both have."""
        if not isinstance(activation, Grid) or activation.static:
            return None
        return next((theirs for ours, theirs in online() if ours == activation.quantizer), None)

    def activation(self, inputs: Any) -> Grid:
        """Raises UserError if torchao quantizes the input by a rule that is not here."""
        found = [ours for ours, own in online() if replace(inputs, kernel_preference=own.kernel_preference) == own]
        if not found:
            raise UserError(f"torchao quantizes its input in a way that no rule here does to the bit: {inputs}")
        return Grid(found[0])

    def data(self, codes: UInt8[Tensor, "o b"], k: int) -> Tensor:
        """Two codes of 4 bits in a byte, else one."""
        own = codes.clone() if self.format.bits == 4 else bits.unpack(codes, self.format.bits, k).contiguous()
        return own.view(torch.float8_e4m3fn) if self.format.bits == 8 else own

    def read(self, kept: Mapping[str, Tensor]) -> tuple[Layout, Held]:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, get_fp_scale

        weight = expected(kept["weight"], MXTensor)
        if (weight.elem_dtype, weight.block_size) != (ELEMENTS[self.format], 32):
            raise UserError(f"it is {weight.elem_dtype} in blocks of {weight.block_size}, and no {self.format.name}")
        if weight.is_swizzled_scales:
            raise UserError("its scales are swizzled: have torchao make it with is_swizzled_scales=False")
        data = weight.qdata.view(torch.uint8)
        codes = data if self.format.bits == 4 else bits.pack(data, self.format.bits)
        return laid_out(codes, self.format, 32, get_fp_scale(weight.scale))


def online() -> Iterator[tuple[Quantizer, Any]]:
    """Ways to quantize an input, as we and as torchao call them."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import QuantizeTensorToMXKwargs

    for fmt, element in ELEMENTS.items():
        for rule in (floor, even, ceil):
            ours = Quantizer(fmt, Granularity("group", 32), E8M0(rule))
            yield ours, QuantizeTensorToMXKwargs(element, 32, ScaleCalculationMode(rule.__name__))


def expected(weight: Tensor, kind: type) -> Any:
    """Raises UserError if the tensor is of another kind."""
    if not isinstance(weight, kind):
        raise UserError(f"it is {type(weight).__name__}, and no {kind.__name__}")
    own: Any = weight
    if not own.qdata.is_contiguous():
        raise UserError("it is transposed")
    return own


def checked(weight: Any, layer: PackedLinear) -> Tensor:
    """Raises UserError if torchao reads another weight, as of tiny scales in fp16."""
    if not weight.dequantize(layer.dtype).equal(layer.dense(layer.dtype)):
        raise UserError(f"torchao would read other values in {layer.dtype}")
    return weight


def to_linear(layer: PackedLinear, counterpart: NVFP4 | MX) -> nn.Linear:
    """A plain layer with torchao's weight. It quantizes its input if torchao can do that to the bit; else give it
    `layer.activation(x)`. With an MXTensor that quantizes no input torchao 0.18 does not multiply.

    Raises:
        UserError: as `counterpart.write`.
    """
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.dtype)
    weight: Any = counterpart.write(layer)["weight"]
    weight.act_quant_kwargs = counterpart.inputs(layer.activation)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
    return made


def from_linear(layer: nn.Linear, counterpart: NVFP4 | MX) -> PackedLinear:
    """The packed layer with what torchao keeps.

    Raises:
        UserError: as `counterpart.read`, or if torchao quantizes the input in a way that is not ours.
    """
    weight: Any = layer.weight.data
    layout, held = counterpart.read({"weight": weight})
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=weight.dtype)
    plain.bias = layer.bias
    made = filled(plain, layout, held, weight.device)
    if weight.act_quant_kwargs is not None:
        made.activation = counterpart.activation(weight.act_quant_kwargs)
    return made
