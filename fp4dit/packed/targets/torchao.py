"""torchao: tensors of its classes in safetensors files, which diffusers loads without pickle.

A tensor's class and attributes are JSON in the metadata of the file, and its parts are tensors such
as `layer._weight_qdata` (`prototype/safetensors` of torchao 0.18, which diffusers 0.42 reads). The
`quant_type` of config.json only says how plain weights would be quantized.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.packed.encoding.integrity import open_safetensors
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel
from fp4dit.packed.targets.config_files import ConfigTarget, read_state
from fp4dit.packed.targets.folders import read_config, read_saved_dtype
from fp4dit.packed.targets.grid import PLAIN, GridWeight, read_grid
from fp4dit.packed.targets.torchao_inputs import read_input_quantizer
from fp4dit.packed.targets.torchao_tensors import (
    WEIGHT_CONFIGS,
    check_attributes,
    decode,
    dequantize,
    encode,
)
from fp4dit.quantization.rules import Rule
from fp4dit.utils.errors import UserError

METADATA = "fp4dit_metadata"  # the key under which `read` passes the file's metadata on


@dataclass(frozen=True)
class TorchAO(ConfigTarget):
    """NVFP4, MXFP4, MXFP8, FP8 rows, and integers of 4 and 8 bits in rows and groups.

    Args:
        mx_kernels: How readers multiply MX weights: "EMULATED" anywhere, by dequantized weights, or
            "AUTO" by the kernels of Blackwell GPUs.

    Example:
        >>> TorchAO().store(packed_layer, (24, 128), torch.bfloat16).settings["_type"]
        'NVFP4Tensor'
    """

    mx_kernels: str = "EMULATED"

    name: ClassVar[str] = "torchao"
    packages: ClassVar[str] = "diffusers 'torchao>=0.18'"
    quant_method: ClassVar[str] = "torchao"
    inputs_note: ClassVar[str] = (
        "its readers quantize those of MXFP4 and MXFP8 layers to MX in blocks of 32, because they "
        "multiply MX weights by nothing else, and leave all others in 16 bits"
    )

    def __post_init__(self) -> None:
        if self.mx_kernels not in ("EMULATED", "AUTO"):
            raise UserError(f"mx_kernels={self.mx_kernels}: choose EMULATED or AUTO")

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        if len(shape) > 2:
            raise UserError(f"it is a convolution, and only linear layers can be: {PLAIN}")
        tensors, settings = encode(
            read_grid(layer), layer.dtype, layer.input_fake_quant, self.mx_kernels
        )
        return StoredLayer(shape, tensors, settings)

    def decode(self, stored: StoredLayer) -> GridWeight:
        return decode(stored)

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        return dequantize(stored, dtype)

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        fmt = "bf16" if dtype == torch.bfloat16 else "fp16"
        if stored.settings["_type"] == "MXTensor":
            return f"its scales are not numbers of {dtype}: use export_format.dtype=bfloat16"
        return (
            f"its scales are not numbers of {dtype}, in which readers have them: use "
            f"weight.scale.dtype={fmt}, or export_format.dtype=float32"
        )

    def describe(self, stored: StoredLayer) -> str:
        return f"{stored.settings['_type']} of torchao"

    def stores_input(self, stored: StoredLayer) -> bool:
        return stored.settings.get("has_same_input", False)

    def quantizes_input(self, stored: StoredLayer) -> bool:
        return stored.settings["_type"] == "MXTensor"

    def build_config(self, model: StoredModel) -> dict[str, Any]:
        kinds = [layer.settings["_type"] for layer in model.layers.values()]
        quant_type = WEIGHT_CONFIGS[max(kinds, key=kinds.count)]
        return {"quant_type": {"default": quant_type}, "modules_to_not_convert": None}

    def build_file_metadata(
        self, model: StoredModel, state: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        names = {name: json.dumps({"_type": "Tensor"}) for name in model.others}
        for name, layer in model.layers.items():
            names[f"{name}.weight"] = json.dumps(
                {key: layer.settings[key] for key in ("_type", "_data", "_tensor_data_names")}
            )
        return {**names, "tensor_names": json.dumps(list(names))}

    def read(self, folder: Path, skeleton: nn.Module) -> StoredModel:
        config = read_config(folder)
        config["quantization_config"] = {METADATA: read_file_metadata(folder)}
        return self.parse_files(read_state(folder), config, skeleton, read_saved_dtype(folder))

    def parse_files(
        self,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        skeleton: nn.Module,
        dtype: torch.dtype,
    ) -> StoredModel:
        model, inputs = super().parse_files(state, config, skeleton, dtype), {}
        for name, layer in model.layers.items():
            if self.quantizes_input(layer):
                attributes = layer.settings["_data"]["act_quant_kwargs"]
                inputs[name] = Rule(name, read_input_quantizer(attributes))
        return replace(model, inputs=inputs)

    def read_settings(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Any] | None:
        if "weight" in tensors or not tensors:
            return None
        settings = config[METADATA].get(f"{name}.weight")
        if settings is None:
            raise UserError(f"{name} has the tensors {', '.join(tensors)}, which are not read")
        parsed = json.loads(settings)
        check_attributes(name, parsed)
        return parsed


def read_file_metadata(folder: Path) -> dict[str, str]:
    """Return the metadata of all safetensors files of a folder.

    Raises:
        UserError: if a file is damaged.
    """
    metadata: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_safetensors(path) as (header, _):
            metadata |= header.get("__metadata__") or {}
    return metadata
