"""Weights as torchao's classes of tensors hold them, and what these compute."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.formats import integer
from fp4dit.numerics.qparams import Affine, Scale
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.bfl import E4M3FN, encode_nvfp4
from fp4dit.packed.targets.blocked_scales import unswizzle
from fp4dit.packed.targets.compressed_formats import (
    E2M1,
    decode_e2m1,
    decode_powers_of_two,
    encode_e2m1,
    encode_powers_of_two,
)
from fp4dit.packed.targets.grid import (
    PLAIN,
    GridWeight,
    make_integer_grid,
    matrix_shape,
    read_integers,
    require_scale,
)
from fp4dit.packed.targets.torchao_inputs import describe_inputs
from fp4dit.utils.errors import UserError

# What quantizes plain weights to these classes. Readers of quantized weights only parse it.
WEIGHT_CONFIGS: dict[str, dict[str, Any]] = {
    "NVFP4Tensor": {"_type": "NVFP4WeightOnlyConfig", "_version": 1, "_data": {}},
    "MXTensor": {"_type": "MXDynamicActivationMXWeightConfig", "_version": 1, "_data": {}},
    "Float8Tensor": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}},
    "Int8Tensor": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}},
    "IntxUnpackedToInt8Tensor": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {}},
}


def encode(
    grid: GridWeight, dtype: torch.dtype, inputs: nn.Module, kernels: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a weight, and its class with its attributes.

    Raises:
        UserError: if there is no such class.
    """
    k = grid.points.shape[1]
    if grid.fmt == E2M1 and grid.width == 32:
        qdata, scale = encode_e2m1(grid, 32)
        return encode_mx(qdata, scale, "float4_e2m1fn_x2", dtype, inputs, kernels)
    if grid.fmt == E2M1:
        codes, scale, factor = encode_nvfp4(grid)
        parts = {"per_tensor_scale": factor, "qdata": codes, "scale": scale}
        attributes = {
            "is_swizzled_scales": False,
            "use_triton_kernel": False,
            "act_quant_kwargs": None,
            "block_size": 16,
            "orig_dtype": name_dtype(dtype),
        }
        return describe_class(parts, "NVFP4Tensor", attributes)
    if grid.fmt == E4M3FN and grid.width == 32 != k:
        scale = grid.by_row(require_scale(grid)).cpu()
        qdata = grid.points.cpu().to(torch.float8_e4m3fn)
        return encode_mx(qdata, scale, "float8_e4m3fn", dtype, inputs, kernels)
    if grid.fmt == E4M3FN and grid.width == k:
        scale = require_scale(grid).cpu()
        parts = {"qdata": grid.points.cpu().to(torch.float8_e4m3fn), "scale": scale}
        attributes = {
            "block_size": [1, k],
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            "dtype": name_dtype(dtype),
        }
        return describe_class(parts, "Float8Tensor", attributes)
    return encode_integers(grid, dtype)


def encode_mx(
    qdata: Tensor,
    scale: Float[Tensor, "o n"],
    element: str,
    dtype: torch.dtype,
    inputs: nn.Module,
    kernels: str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the class of a weight in MXFP4 or MXFP8."""
    act_quant, is_same = describe_inputs(inputs, kernels)
    attributes = {
        "elem_dtype": {"_type": "torch.dtype", "_data": element},
        "block_size": 32,
        "orig_dtype": name_dtype(dtype),
        "kernel_preference": {"_type": "KernelPreference", "_data": kernels},
        "act_quant_kwargs": act_quant,
        "is_swizzled_scales": False,
    }
    powers = encode_powers_of_two(scale).view(torch.float8_e8m0fnu)
    tensors, settings = describe_class({"qdata": qdata, "scale": powers}, "MXTensor", attributes)
    return tensors, settings | {"has_same_input": is_same}


def encode_integers(
    grid: GridWeight, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the class of a weight of integers.

    Symmetric INT8 in rows is of the class that has INT8 kernels. All others have a byte for each
    code, also if it has 4 bits.

    Raises:
        UserError: if it does not consist of integers of 4 or 8 bits.
    """
    k, bits = grid.points.shape[1], int(grid.fmt.bits)
    if bits not in (4, 8) or "int" not in grid.fmt.name:
        raise UserError(
            f"its values are {grid.fmt.name} in blocks of {grid.width}: use weight.format of int4 "
            "or int8, e2m1 in groups of 16 or 32, e4m3fn in groups of 32 or rows, or " + PLAIN
        )
    points, qparams = read_integers(grid, bits)
    middle = 2 ** (bits - 1)
    qdata = (points - middle).cpu().to(torch.int8)
    scale = grid.by_row(qparams.scale).cpu()
    if grid.fmt == integer(8) and grid.width == k:
        attributes = {
            "act_quant_kwargs": None,
            "reduce_range": False,
            "block_size": [1, k],
            "dtype": name_dtype(dtype),
        }
        return describe_class({"qdata": qdata, "scale": scale}, "Int8Tensor", attributes)
    zero = (grid.by_row(qparams.zero) - middle).cpu().to(torch.int8)
    attributes = {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
        "block_size": [1, grid.width],
        "dtype": name_dtype(dtype),
        "activation_quantization": None,
    }
    parts = {"qdata": qdata, "scale": scale.to(dtype), "zero_point": zero}
    return describe_class(parts, "IntxUnpackedToInt8Tensor", attributes)


def describe_class(
    parts: Mapping[str, Tensor], kind: str, attributes: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by the suffix of their names, and what the metadata says of them."""
    settings = {"_type": kind, "_data": dict(attributes), "_tensor_data_names": list(parts)}
    return {f"_weight_{name}": value for name, value in parts.items()}, settings


def name_dtype(dtype: torch.dtype) -> dict[str, str]:
    """Return a dtype as the JSON of torchao has it."""
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def decode(stored: StoredLayer) -> GridWeight:
    """Return the weight that the tensors hold.

    Raises:
        UserError: if they do not fit the class or the layer.
    """
    rows, k = matrix_shape(stored.shape)
    kind, data = stored.settings["_type"], stored.settings["_data"]
    parts = {name.removeprefix("_weight_"): value for name, value in stored.tensors.items()}
    qdata, scale = parts["qdata"], parts["scale"]
    if kind == "NVFP4Tensor":
        require_dtypes(stored, torch.uint8, torch.float8_e4m3fn)
        scale = read_scales(scale, data, (rows, k // 16)).float()
        factor = parts["per_tensor_scale"]
        if (factor.dtype, factor.numel()) != (torch.float32, 1):
            raise UserError("its scale of the tensor is not one number of float32")
        return require_size(decode_e2m1(qdata, scale * factor, 16), stored)
    if kind == "MXTensor":
        element = torch.uint8 if is_fp4(data) else torch.float8_e4m3fn
        require_dtypes(stored, element, torch.float8_e8m0fnu)
        powers = read_scales(scale, data, (rows, k // 32)).view(torch.uint8)
        scale = decode_powers_of_two(powers)
        if is_fp4(data):
            return require_size(decode_e2m1(qdata, scale, 32), stored)
        return make_grid(stored, GridWeight(E4M3FN, qdata.float(), Scale(scale.view(-1, 1)), 32))
    if kind == "Float8Tensor":
        require_dtypes(stored, torch.float8_e4m3fn, torch.float32)
        return make_grid(stored, GridWeight(E4M3FN, qdata.float(), Scale(scale.view(-1, 1)), k))
    bits = 8 if kind == "Int8Tensor" else int(data["target_dtype"]["_data"].removeprefix("int"))
    if qdata.dtype != torch.int8 or not scale.is_floating_point() or scale.numel() % rows:
        raise UserError("it is not of int8 with scales for each row")
    middle = 2 ** (bits - 1)
    zero = parts["zero_point"].float() if "zero_point" in parts else torch.zeros_like(scale)
    grid = make_integer_grid(
        qdata.float() + middle, scale.view(rows, -1), zero.view(rows, -1) + middle, bits
    )
    if isinstance(grid.qparams, Affine) and not (grid.points <= 2 * middle - 1).all():
        raise UserError(f"its codes are not of {bits} bits")
    return make_grid(stored, grid)


def dequantize(stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
    """Return the weight as the class computes it: integers and MX in `dtype`, others in fp32."""
    grid = decode(stored)
    kind = stored.settings["_type"]
    if kind not in ("MXTensor", "IntxUnpackedToInt8Tensor"):
        return grid.dequantize().to(dtype)
    values, qparams = grid.points.reshape(-1, grid.width), grid.qparams
    if isinstance(qparams, Affine):
        values = values - qparams.zero
    assert isinstance(qparams, Affine | Scale)
    return (values.to(dtype) * qparams.scale.to(dtype)).view(grid.points.shape)


def is_fp4(data: Mapping[str, Any]) -> bool:
    """Return whether the attributes of an MX tensor are those of FP4, and not of FP8."""
    return data["elem_dtype"]["_data"] == "float4_e2m1fn_x2"


def read_scales(scale: Tensor, data: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """Return the scales of blocks as a matrix."""
    return unswizzle(scale, shape) if data["is_swizzled_scales"] else scale


def require_dtypes(stored: StoredLayer, qdata: torch.dtype, scale: torch.dtype) -> None:
    """Raise a UserError if the codes or the scales have another dtype."""
    found = (stored.tensors["_weight_qdata"].dtype, stored.tensors["_weight_scale"].dtype)
    if found != (qdata, scale):
        raise UserError(f"it is of {found[0]} and {found[1]}, and has to be of {qdata} and {scale}")


def make_grid(stored: StoredLayer, grid: GridWeight) -> GridWeight:
    """Return a weight with one scale for each of its blocks.

    Raises:
        UserError: if its size is another.
    """
    block = stored.settings["_data"]["block_size"]
    width = block[1] if isinstance(block, list) else block
    scales = stored.tensors["_weight_scale"]
    if grid.width != width or grid.points.numel() != scales.numel() * width:
        raise UserError(f"there are scales {list(scales.shape)} for blocks of {width}")
    return require_size(grid, stored)


def require_size(grid: GridWeight, stored: StoredLayer) -> GridWeight:
    """Return a weight. Raise a UserError if it has another shape than the layer."""
    if tuple(grid.points.shape) != matrix_shape(stored.shape):
        raise UserError(f"its weight is {list(grid.points.shape)}, and not {list(stored.shape)}")
    return grid


# The attributes that are read, or that change no number.
VARIABLE = {
    *("block_size", "orig_dtype", "dtype", "is_swizzled_scales", "target_dtype", "elem_dtype"),
    *("kernel_preference", "use_triton_kernel"),
}


def check_attributes(name: str, settings: Mapping[str, Any]) -> None:
    """Raise a UserError if a tensor has attributes that change what it computes.

    Inputs of MX layers are checked by `read_input_quantizer`.
    """
    kind, data = settings.get("_type"), settings.get("_data")
    if kind not in WEIGHT_CONFIGS or not isinstance(data, Mapping):
        known = ", ".join(WEIGHT_CONFIGS)
        raise UserError(f"{name} is a {kind} of torchao, and only {known} are read")
    for key, value in data.items():
        if (
            key in VARIABLE
            or value in (None, False)
            or (kind, key) == ("MXTensor", "act_quant_kwargs")
        ):
            continue
        raise UserError(f"{name} has {key}={value}, which has no counterpart here")
