"""compressed-tensors: NVFP4 and MXFP4 for vLLM and transformers. diffusers does not read it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel
from fp4dit.packed.targets.compressed_formats import (
    FORMATS,
    MXFP4_INPUTS,
    CompressedFormat,
    CompressedMXFP4,
)
from fp4dit.packed.targets.config_files import ConfigTarget
from fp4dit.packed.targets.grid import GridWeight, read_grid
from fp4dit.quantization.rules import Rule
from fp4dit.utils.errors import UserError

UNSUPPORTED_SECTIONS = ("transform_config", "sparsity_config", "kv_cache_scheme")


@dataclass(frozen=True)
class CompressedTensors(ConfigTarget):
    """NVFP4 and MXFP4 weights, and MXFP4 inputs, as compressed-tensors describes them.

    Example:
        >>> CompressedTensors().store(packed_layer, (24, 128), torch.bfloat16).tensors.keys()
        dict_keys(['weight_packed', 'weight_scale', 'weight_global_scale'])
    """

    name: ClassVar[str] = "compressed_tensors"
    packages: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"
    inputs_note: ClassVar[str] = "its readers leave them as they are"

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        if len(shape) > 2:
            raise UserError("it is a convolution, and only linear layers can be")
        grid, reasons = read_grid(layer), []
        for fmt in FORMATS:
            try:
                tensors = fmt.encode(grid, layer.dtype)
            except UserError as error:
                reasons.append(f"it cannot be {fmt.name}, because {error}")
                continue
            inputs = fmt.describe_input(layer.input_fake_quant)
            settings = {
                "format": fmt.name,
                "weights": fmt.weight_args,
                "input_activations": inputs,
            }
            return StoredLayer(shape, tensors, settings)
        raise UserError("; ".join(reasons))

    def decode(self, stored: StoredLayer) -> GridWeight:
        return find_format(stored).decode(stored.tensors)

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        return self.decode(stored).dequantize().to(dtype)

    def describe(self, stored: StoredLayer) -> str:
        return stored.settings["format"]

    def stores_input(self, stored: StoredLayer) -> bool:
        return stored.settings["input_activations"] is not None

    def build_config(self, model: StoredModel) -> dict[str, Any]:
        """Return the config. If all layers are alike, one group targets all linear layers."""
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in model.layers.items():
            scheme = dict(layer.settings)
            group = groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})
            group["targets"].append(name)
        formats = list(dict.fromkeys(group["format"] for group in groups.values()))
        config_groups = {}
        for i, group in enumerate(groups.values()):
            targets = ["Linear"] if len(groups) == 1 else group["targets"]
            config_groups[f"group_{i}"] = {**group, "targets": targets, "output_activations": None}
        return {
            "quantization_status": "compressed",
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "config_groups": config_groups,
            "ignore": list(model.left),
        }

    def parse_files(
        self,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        skeleton: nn.Module,
        dtype: torch.dtype,
    ) -> StoredModel:
        for section in UNSUPPORTED_SECTIONS:
            if config["quantization_config"].get(section):
                raise UserError(f"the checkpoint has a {section}, which has no counterpart here")
        model, inputs = super().parse_files(state, config, skeleton, dtype), {}
        for name, layer in model.layers.items():
            if self.stores_input(layer):
                inputs[name] = make_input_rule(name, layer.settings["input_activations"])
        return replace(model, inputs=inputs)

    def read_settings(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Any] | None:
        if "weight_packed" not in tensors:
            return None
        group = find_config_group(name, config)
        if group["output_activations"] is not None:
            raise UserError(f"the output of {name} is quantized, which has no counterpart here")
        return {**group, "format": group["format"] or config.get("format")}

    def write_example(self, class_name: str, pipeline: str | None, dtype: torch.dtype) -> str:
        return "# vLLM and compressed-tensors read it, and diffusers does not."


def find_format(stored: StoredLayer) -> CompressedFormat:
    """Return the format of a layer.

    Raises:
        UserError: if it is not read.
    """
    for fmt in FORMATS:
        if fmt.name == stored.settings["format"]:
            return fmt
    names = " and ".join(fmt.name for fmt in FORMATS)
    raise UserError(f"it is {stored.settings['format']}, and only {names} are read")


def find_config_group(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the group of the config that targets a layer, by name, by pattern, or as "Linear".

    Raises:
        UserError: if no group targets it.
    """
    defaults = {
        "format": None,
        "input_activations": None,
        "output_activations": None,
        "targets": (),
    }
    for group in config.get("config_groups", {}).values():
        group = defaults | group
        for target in group["targets"]:
            is_pattern = target.startswith("re:")
            if target in (name, "Linear") or (is_pattern and re.match(target[3:], name)):
                return group
    raise UserError(f"{name} is packed, and no group of the config names it")


def make_input_rule(name: str, scheme: Mapping[str, Any]) -> Rule:
    """Make the rule that quantizes the input of a layer bit-exactly as its config says.

    Raises:
        UserError: if there is no such rule.
    """
    args = {key: value for key, value in scheme.items() if value is not None}
    if args != CompressedMXFP4().quantization_args(dynamic=True):
        raise UserError(
            f"the input of {name} is quantized as {dict(scheme)}, which no rule here does "
            "bit-exactly: set input_activations to null in the config to convert the weights alone"
        )
    return Rule(name, MXFP4_INPUTS)
