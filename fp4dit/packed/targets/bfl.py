"""NVFP4 and FP8 as Black Forest Labs store them, in the layout of NVIDIA's ModelOpt.

A weight in NVFP4 is E2M1 codes, the first of two in the low half of a byte, times E4M3 scales of 16
values times `weight_scale_2`. A weight in FP8 is E4M3 times an fp32 scale for each row. diffusers
recognizes both by the names of the tensors (`quantizers/bfl` of diffusers 0.42).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.formats import floating
from fp4dit.numerics.qparams import Scale
from fp4dit.packed.encoding.integrity import build_metadata
from fp4dit.packed.encoding.qparams import E4M3Encoding
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel
from fp4dit.packed.targets.compressed_formats import decode_e2m1, encode_e2m1
from fp4dit.packed.targets.config_files import group_by_layer, read_state
from fp4dit.packed.targets.folders import read_config, read_saved_dtype
from fp4dit.packed.targets.grid import (
    PLAIN,
    GridWeight,
    make_format_index,
    matrix_shape,
    read_grid,
    require_scale,
    require_width,
)
from fp4dit.packed.targets.single_files import SingleFileTarget
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import save_tensors

E4M3FN = floating(4, 3, reserved=1)

NVFP4_RANGE = 6.0 * 448.0  # the largest E2M1 number times the largest E4M3 scale


@dataclass(frozen=True)
class BFL(SingleFileTarget):
    """NVFP4 weights, four over six among them, and FP8 weights with a scale for each row.

    Args:
        largest_input: The magnitude up to which readers quantize inputs of NVFP4 layers without
            clipping. It is one number for all layers and calls; every call has its own here.

    Example:
        >>> BFL().store(packed_layer, (24, 128), torch.bfloat16).tensors.keys()
        dict_keys(['weight', 'weight_scale', 'weight_scale_2', 'input_scale'])
    """

    largest_input: float = 1024.0

    name: ClassVar[str] = "bfl"
    packages: ClassVar[str] = "'diffusers>=0.42'"
    file_name: ClassVar[str] = "bfl.safetensors"
    config_class: ClassVar[str] = "BFLQuantizationConfig"
    inputs_note: ClassVar[str] = (
        "its readers quantize those of NVFP4 layers on Blackwell GPUs with FlashInfer, by an "
        "input_scale that was not calibrated, and those of FP8 layers by token on GPUs of sm_89 "
        "or later; elsewhere they leave them in 16 bits"
    )

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        if len(shape) > 2:
            raise UserError(f"it is a convolution, and only linear layers can be: {PLAIN}")
        grid = read_grid(layer)
        if grid.fmt != E4M3FN:
            names = ("weight", "weight_scale", "weight_scale_2")
            tensors = {"input_scale": torch.tensor(self.largest_input / NVFP4_RANGE)}
            tensors |= dict(zip(names, encode_nvfp4(grid), strict=True))
            return StoredLayer(shape, tensors, {"format": "nvfp4"})
        require_width(grid, matrix_shape(shape)[1:])
        scale = require_scale(grid).flatten().cpu()
        weight = grid.points.cpu().to(torch.float8_e4m3fn)
        return StoredLayer(shape, {"weight": weight, "weight_scale": scale}, {"format": "fp8r"})

    def decode(self, stored: StoredLayer) -> GridWeight:
        weight, scale = stored.tensors["weight"], stored.tensors["weight_scale"]
        rows, k = matrix_shape(stored.shape)
        if stored.settings["format"] == "nvfp4":
            factor = stored.tensors["weight_scale_2"]
            dtypes = (weight.dtype, scale.dtype, factor.dtype, factor.numel())
            if dtypes != (torch.uint8, torch.float8_e4m3fn, torch.float32, 1):
                raise UserError("it is not of uint8, float8_e4m3fn, and one number for all")
            return decode_e2m1(weight, scale.float() * factor.view(()), 16)
        if (weight.dtype, scale.dtype) != (torch.float8_e4m3fn, torch.float32):
            raise UserError("it is not of float8_e4m3fn and float32")
        if (tuple(weight.shape), scale.numel()) != ((rows, k), rows):
            raise UserError(
                f"there are {scale.numel()} scales for a weight {list(weight.shape)}, and have to "
                f"be {rows} for {[rows, k]}"
            )
        return GridWeight(E4M3FN, weight.float(), Scale(scale.view(-1, 1)), k)

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        return self.decode(stored).dequantize().to(dtype)

    def quantizes_input(self, stored: StoredLayer) -> bool:
        return True

    def describe(self, stored: StoredLayer) -> str:
        return "NVFP4" if stored.settings["format"] == "nvfp4" else "FP8 in rows"

    def write(self, model: StoredModel, folder: Path) -> None:
        state = dict(model.others)
        for name, layer in model.layers.items():
            for suffix, value in layer.tensors.items():
                state[f"{name}.{suffix}"] = value
        text = json.dumps(model.config, indent=2)
        (folder / "config.json").write_text(text + "\n")
        metadata = {"format": "pt", **build_metadata(state, json.loads(text))}
        save_tensors(state, folder / self.file_name, metadata)

    def reads(self, folder: Path) -> bool:
        if "quantization_config" in read_config(folder):
            return False
        return any(name.endswith(".weight_scale") for name in read_state(folder))

    def read(self, folder: Path, skeleton: nn.Module) -> StoredModel:
        state, layers = read_state(folder), {}
        tensors_by_layer = group_by_layer(state)
        for name, source in find_layers(skeleton).items():
            tensors = tensors_by_layer.get(name, {})
            if "weight_scale" not in tensors:
                continue
            shape = tuple(source.weight.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
            layers[name] = StoredLayer(shape, tensors, {"format": name_format(tensors)})
            for suffix in tensors:
                del state[f"{name}.{suffix}"]
        left = [name for name in find_layers(skeleton) if name not in layers]
        return StoredModel(read_config(folder), read_saved_dtype(folder), layers, state, left)


def name_format(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the format of a layer's tensors, as diffusers tells it."""
    return "nvfp4" if "weight_scale_2" in tensors else "fp8r"


def encode_nvfp4(grid: GridWeight) -> tuple[UInt8[Tensor, "o b"], Tensor, Float[Tensor, ""]]:
    """Return the codes of a weight in NVFP4, its E4M3 scales, and the factor of these.

    Raises:
        UserError: if it is not in NVFP4.
    """
    codes, scales = encode_e2m1(grid, 16)
    parts = E4M3Encoding(1).encode(scales.flatten(), make_format_index(scales.numel()))
    if parts is None:
        raise UserError(
            "its scales are not numbers of E4M3 times one fp32 number: use weight.scale.rule=nvfp4"
        )
    numbers = parts[""].view(torch.float8_e4m3fn).view(scales.shape)
    return codes, numbers, parts["factor"].view(torch.float32)[0]
