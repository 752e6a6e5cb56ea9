"""One file of ComfyUI: NVFP4, MXFP8, FP8, INT8 and rotated INT4, read through comfy-kitchen.

A layer's format is JSON in its tensor `comfy_quant`, and in `_quantization_metadata` of the file
(QUANTIZATION.md of ComfyUI). NVFP4 keeps the first of two codes in the high half of a byte, where
ModelOpt and diffusers have it in the low half, and scales of blocks are in the order of the tensor
cores. comfy-kitchen 0.2.40 multiplies the scales of NVFP4 and FP8 in the dtype of the model, where
it has no kernels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.formats import integer
from fp4dit.numerics.qparams import Scale
from fp4dit.packed.encoding.integrity import build_metadata
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import FittedTransform, StoredLayer, StoredModel, Target
from fp4dit.packed.targets.bfl import E4M3FN, encode_nvfp4
from fp4dit.packed.targets.blocked_scales import swizzle, unswizzle
from fp4dit.packed.targets.comfyui_rotation import (
    INT4_ROTATED,
    encode_rotation,
    pack_int4,
    read_rotation,
    restore_rotation,
    rotation_settings,
    unpack_int4,
)
from fp4dit.packed.targets.compressed_formats import (
    E2M1,
    decode_e2m1,
    decode_powers_of_two,
    encode_powers_of_two,
)
from fp4dit.packed.targets.config_files import group_by_layer, read_state
from fp4dit.packed.targets.folders import read_config, read_saved_dtype
from fp4dit.packed.targets.grid import (
    PLAIN,
    GridWeight,
    make_integer_grid,
    matrix_shape,
    read_grid,
    require_scale,
    require_width,
)
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import save_tensors

FILE_NAME = "comfyui.safetensors"

MARKER = "comfy_quant"

# The multiple of rows and columns that a format has; ComfyUI fills up smaller ones.
TILES = {"nvfp4": 16, "mxfp8": 32, "float8_e4m3fn": 1, "int8_tensorwise": 1, INT4_ROTATED: 1}

SAME_NAMES = ("QwenImageTransformer2DModel",)  # in ComfyUI and in diffusers


@dataclass(frozen=True)
class ComfyUI(Target):
    """NVFP4, MXFP8, FP8 with one scale, and INT8 in rows, in one file beside config.json.

    INT8 and INT4 in rows may be rotated by regular Hadamard matrices (ConvRot).

    Tensors have the names of diffusers. ComfyUI has others for most models, which are not known
    here: only for those of `SAME_NAMES` it finds the layers.

    Example:
        >>> ComfyUI().store(packed_layer, (32, 128), torch.bfloat16).settings
        {'format': 'nvfp4'}
    """

    name: ClassVar[str] = "comfyui"
    packages: ClassVar[str] = "comfy-kitchen"
    inputs_note: ClassVar[str] = (
        "ComfyUI quantizes those of NVFP4, MXFP8, INT8 and INT4 layers, and those of FP8 layers if "
        "asked to, each call with scales of its own, on GPUs with such kernels"
    )
    holds_transforms: ClassVar[bool] = True

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        if len(shape) > 2:
            raise UserError(f"it is a convolution, and only linear layers can be: {PLAIN}")
        size = encode_rotation(layer.transform_chain)
        fmt, tensors = encode_weight(read_grid(layer, with_transforms=True), size is not None)
        if any(size % TILES[fmt] for size in shape):
            raise UserError(f"its inputs and outputs are not multiples of {TILES[fmt]}: {PLAIN}")
        return StoredLayer(shape, tensors, {"format": fmt, **rotation_settings(fmt, size)})

    def restore_transforms(self, stored: StoredLayer) -> Sequence[FittedTransform]:
        return restore_rotation(stored)

    def decode(self, stored: StoredLayer) -> GridWeight:
        fmt, (rows, k) = stored.settings["format"], matrix_shape(stored.shape)
        check_tensors(stored)
        weight, scale = stored.tensors["weight"], stored.tensors["weight_scale"]
        if fmt == "nvfp4":
            numbers = unswizzle(scale, (rows, k // 16)).float()
            factor = stored.tensors["weight_scale_2"].view(())
            return decode_e2m1(swap_halves(weight), numbers * factor, 16)
        if fmt == "mxfp8":
            powers = unswizzle(scale.view(torch.uint8), (rows, k // 32))
            column = decode_powers_of_two(powers).view(-1, 1)
            return GridWeight(E4M3FN, weight.float(), Scale(column), 32)
        column = scale.reshape(-1, 1).expand(rows, 1).contiguous()
        if fmt == "float8_e4m3fn":
            return GridWeight(E4M3FN, weight.float(), Scale(column), k)
        if fmt == INT4_ROTATED:
            points = unpack_int4(weight, k)
            return make_integer_grid(points + 8, column, torch.full_like(column, 8), 4)
        return make_integer_grid(weight.float() + 128, column, torch.full_like(column, 128), 8)

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        grid, fmt = self.decode(stored), stored.settings["format"]
        values, scale = grid.points.reshape(-1, grid.width), grid.qparams
        if fmt in ("mxfp8", "int8_tensorwise", INT4_ROTATED) or not isinstance(scale, Scale):
            return grid.dequantize().to(dtype)
        if fmt == "float8_e4m3fn":
            return (values.to(dtype) * scale.scale.to(dtype)).view(grid.points.shape)
        rows, k = matrix_shape(stored.shape)
        numbers = unswizzle(stored.tensors["weight_scale"], (rows, k // 16)).reshape(-1, 1)
        total = stored.tensors["weight_scale_2"].to(dtype) * numbers.to(dtype)
        return (values.to(dtype) * total).view(rows, k)

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        if stored.settings["format"] == "nvfp4":
            return (
                f"ComfyUI multiplies its scales in {dtype}, which rounds them: use "
                "weight.scale.rule=nvfp4_power_of_two, or export_format.dtype=float32"
            )
        fmt = "bf16" if dtype == torch.bfloat16 else "fp16"
        return (
            f"its scale is not a number of {dtype}, in which ComfyUI has it: use "
            f"weight.scale.dtype={fmt}, or export_format.dtype=float32"
        )

    def describe(self, stored: StoredLayer) -> str:
        rotated = " of rotated inputs" if "convrot_groupsize" in stored.settings else ""
        return f"{stored.settings['format']}{rotated} of ComfyUI"

    def quantizes_input(self, stored: StoredLayer) -> bool:
        return True

    def write(self, model: StoredModel, folder: Path) -> None:
        state, layers = dict(model.others), {}
        for name, layer in model.layers.items():
            layers[name] = dict(layer.settings)
            for suffix, value in layer.tensors.items():
                state[f"{name}.{suffix}"] = value
            marker = json.dumps(layers[name]).encode()
            state[f"{name}.{MARKER}"] = torch.tensor(list(marker), dtype=torch.uint8)
        text = json.dumps(model.config, indent=2)
        (folder / "config.json").write_text(text + "\n")
        quantization = {"format_version": "1.0", "layers": layers}
        metadata = {
            "format": "pt",
            "_quantization_metadata": json.dumps(quantization),
            **build_metadata(state, json.loads(text)),
        }
        save_tensors(state, folder / FILE_NAME, metadata)

    def reads(self, folder: Path) -> bool:
        if "quantization_config" in read_config(folder):
            return False
        return any(name.endswith(f".{MARKER}") for name in read_state(folder))

    def read(self, folder: Path, skeleton: nn.Module) -> StoredModel:
        state, layers = read_state(folder), {}
        tensors_by_layer = group_by_layer(state)
        for name, source in find_layers(skeleton).items():
            tensors = tensors_by_layer.get(name, {})
            if MARKER not in tensors:
                continue
            for suffix in tensors:
                del state[f"{name}.{suffix}"]
            settings = read_marker(name, tensors.pop(MARKER))
            shape = tuple(source.weight.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
            layers[name] = StoredLayer(shape, tensors, settings)
        left = [name for name in find_layers(skeleton) if name not in layers]
        return StoredModel(read_config(folder), read_saved_dtype(folder), layers, state, left)

    def write_example(self, class_name: str, pipeline: str | None, dtype: torch.dtype) -> str:
        folder = "this/folder/transformer" if pipeline else "this/folder"
        names = (
            f"# ComfyUI has other names for the layers of {class_name}, which are not known here:\n"
            "# rename the tensors before it loads them.\n"
        )
        return (
            f"# Copy {folder}/{FILE_NAME} to models/diffusion_models of ComfyUI.\n"
            f"{'' if class_name in SAME_NAMES else names}# diffusers does not read it."
        )


def encode_weight(grid: GridWeight, is_rotated: bool) -> tuple[str, dict[str, Tensor]]:
    """Return the name of a weight's format, and its tensors.

    Args:
        grid: The weight.
        is_rotated: Whether the layer rotates its input.

    Raises:
        UserError: if ComfyUI has no such format.
    """
    k = grid.points.shape[1]
    if is_rotated and grid.fmt not in (integer(4), integer(8)):
        raise UserError(f"ComfyUI rotates int4 and int8, and its values are {grid.fmt.name}")
    if grid.fmt == E2M1:
        codes, numbers, factor = encode_nvfp4(grid)
        tensors = {"weight": swap_halves(codes), "weight_scale": swizzle(numbers)}
        return "nvfp4", tensors | {"weight_scale_2": factor}
    scale = require_scale(grid).cpu()
    if grid.fmt == integer(4) and is_rotated:
        require_width(grid, (k,))
        return INT4_ROTATED, {"weight": pack_int4(grid.points.cpu()), "weight_scale": scale[:, 0]}
    if grid.fmt == E4M3FN and grid.width == 32 != k:
        powers = swizzle(encode_powers_of_two(grid.by_row(scale)))
        weight = grid.points.cpu().to(torch.float8_e4m3fn)
        return "mxfp8", {"weight": weight, "weight_scale": powers.view(torch.float8_e8m0fnu)}
    if grid.fmt == E4M3FN:
        require_width(grid, (k,))
        if (scale != scale[0]).any():
            raise UserError(
                "each row has a scale, and FP8 of ComfyUI one for the layer: use "
                "weight.granularity=tensor, or weight.format=int8"
            )
        weight = grid.points.cpu().to(torch.float8_e4m3fn)
        return "float8_e4m3fn", {"weight": weight, "weight_scale": scale[0, 0].clone()}
    if grid.fmt != integer(8):
        raise UserError(
            f"its values are {grid.fmt.name}: use weight.format of e2m1 in groups of 16, e4m3fn in "
            f"groups of 32 or with one scale, or int8 in rows, or {PLAIN}"
        )
    require_width(grid, (k,))
    return "int8_tensorwise", {"weight": grid.points.cpu().to(torch.int8), "weight_scale": scale}


def swap_halves(codes: UInt8[Tensor, "o b"]) -> UInt8[Tensor, "o b"]:
    """Return bytes of two codes with these swapped."""
    return codes >> 4 | codes << 4


def read_marker(name: str, marker: Tensor) -> dict[str, Any]:
    """Return what the tensor `comfy_quant` of a layer says.

    Raises:
        UserError: if it says something that has no counterpart here.
    """
    settings = json.loads(bytes(marker.tolist()))
    if not isinstance(settings, Mapping) or settings.get("format") not in TILES:
        raise UserError(f"{name} is {settings}, and only {', '.join(TILES)} are read")
    return {"format": settings["format"], **read_rotation(name, settings)}


def check_tensors(stored: StoredLayer) -> None:
    """Raise a UserError if a layer's tensors do not have the dtypes and shapes of its format."""
    fmt, (rows, k) = stored.settings["format"], matrix_shape(stored.shape)
    dtypes = {
        "nvfp4": (torch.uint8, torch.float8_e4m3fn),
        "mxfp8": (torch.float8_e4m3fn, torch.float8_e8m0fnu),
        "float8_e4m3fn": (torch.float8_e4m3fn, torch.float32),
        "int8_tensorwise": (torch.int8, torch.float32),
        INT4_ROTATED: (torch.int8, torch.float32),
    }
    weight, scale = stored.tensors["weight"], stored.tensors["weight_scale"]
    shape = (rows, k // 2) if fmt in ("nvfp4", INT4_ROTATED) else (rows, k)
    found = (weight.dtype, scale.dtype)
    if fmt == "mxfp8" and scale.dtype == torch.uint8:
        found = (weight.dtype, torch.float8_e8m0fnu)
    counts_by_format = {"float8_e4m3fn": (1,), "int8_tensorwise": (1, rows), INT4_ROTATED: (rows,)}
    counts = counts_by_format.get(fmt, (scale.numel(),))
    if found != dtypes[fmt] or tuple(weight.shape) != shape or scale.numel() not in counts:
        raise UserError(
            f"its weight is {list(weight.shape)} of {weight.dtype} with {scale.numel()} scales of "
            f"{scale.dtype}, which is not {fmt}"
        )
    factor = stored.tensors.get("weight_scale_2")
    if fmt == "nvfp4" and (factor is None or factor.numel() != 1 or factor.dtype != torch.float32):
        raise UserError("it has no weight_scale_2, one number of float32")
