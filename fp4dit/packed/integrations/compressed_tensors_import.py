"""Import a compressed-tensors checkpoint as a packed transformer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.packed.integrations.base import make_filled_layer
from fp4dit.packed.integrations.compressed_tensors import FORMATS, MXFP4_INPUTS, CompressedMXFP4
from fp4dit.packed.integrations.diffusers import attach_diffusers_config_
from fp4dit.packed.integrations.folders import (
    find_transformer,
    read_config,
    read_saved_dtype,
    require_new_folder,
)
from fp4dit.packed.model import describe_model, find_submodule, install_input_quantizers_
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import convert_to_os_errors

TENSOR_NAMES = ("weight_packed", "weight_scale", "weight_global_scale")

UNSUPPORTED_SECTIONS = ("transform_config", "sparsity_config", "kv_cache_scheme")


def import_compressed_tensors(path: str, out: str) -> Sequence[str]:
    """Write a transformer in a format of compressed-tensors into a new folder, as packed model.

    Args:
        path: the folder of the transformer or of its pipeline.
        out: the new folder.

    Returns:
        Notes for the user.

    Raises:
        UserError: if there is no such transformer, or if it cannot be represented.
    """
    folder, target = find_transformer(path, "compressed-tensors"), require_new_folder(out)
    config = read_config(folder)
    quantization_config = config.pop("quantization_config")
    model_class = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
        raise UserError(
            f"{config['_class_name']} in {folder}/config.json is not a model of diffusers"
        )
    with init_empty_weights():
        model = model_class.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
        model = model.to(read_saved_dtype(folder))
    load_compressed_tensors_(model, read_state(folder), quantization_config)
    with convert_to_os_errors(target):
        model.save_pretrained(target)
    call = f"diffusers.{model_class.__name__}.from_pretrained({str(out)!r})"
    return [f"after `import fp4dit`, {call} loads it"]


def load_compressed_tensors_(
    model: ModelMixin, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Load a compressed-tensors checkpoint into a plain model, in place.

    Its layers become packed layers, and `save_pretrained` saves it as a packed model. The model may
    be on the meta device.

    Args:
        config: the `quantization_config` of the checkpoint.

    Raises:
        UserError: if a layer or an input cannot be represented. The message names it.
    """
    for section in UNSUPPORTED_SECTIONS:
        if config.get(section):
            raise UserError(f"the checkpoint has a {section}, which has no counterpart here")
    remaining, rules, packed = dict(state), {}, {}
    for key in state:
        if not key.endswith(".weight_packed"):
            continue
        name = key.removesuffix(".weight_packed")
        group = find_config_group(name, config)
        tensors = pop_layer_tensors_(remaining, name)
        layer = decode_layer(name, tensors, group["format"] or config.get("format"), model)
        model.set_submodule(name, layer)
        packed[name] = layer
        for buffer, value in layer.packed_buffers.items():
            remaining[f"{name}.{buffer}"] = value
        if group["output_activations"] is not None:
            raise UserError(f"the output of {name} is quantized, which has no counterpart here")
        if group["input_activations"] is not None:
            rules[name] = make_input_rule(name, group["input_activations"])
    try:
        model.load_state_dict(remaining, assign=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint is not of {type(model).__name__}: {error}") from error
    description = describe_model(packed, dict.fromkeys(packed, Rule("*", None)), rules)
    install_input_quantizers_(model, description.inputs, TimestepContext())
    attach_diffusers_config_(model, description)


def pop_layer_tensors_(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Remove the stored tensors of a layer's weight from `state`, and return them by suffix."""
    tensors = {}
    for suffix in TENSOR_NAMES:
        if f"{name}.{suffix}" in state:
            tensors[suffix] = state.pop(f"{name}.{suffix}")
    return tensors


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


def decode_layer(
    name: str, tensors: Mapping[str, Tensor], format_name: str | None, model: nn.Module
) -> PackedLinear:
    """Make the packed layer that stored tensors describe.

    Args:
        tensors: the tensors of the layer, by the suffix of their names.
        format_name: the name of the format in compressed-tensors.

    Raises:
        UserError: if the format is not supported, or the tensors do not fit the model.
    """
    fmt = next((fmt for fmt in FORMATS if fmt.name == format_name), None)
    if fmt is None:
        names = " and ".join(fmt.name for fmt in FORMATS)
        raise UserError(f"{name} is {format_name}, and only {names} are read")
    source = find_submodule(model, name)
    if not isinstance(source, nn.Linear):
        raise UserError(
            f"{name} is not a linear layer of {type(model).__name__}: the checkpoint is of another "
            "model"
        )
    try:
        layout, buffers = fmt.decode(tensors)
        return make_filled_layer(source, layout, buffers, "cpu")
    except KeyError as error:
        raise UserError(
            f"{name} lacks {error.args[0]}: copy all files of the checkpoint"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


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


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all safetensors files in a folder.

    Raises:
        UserError: if a file is damaged.
    """
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            state |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return state
