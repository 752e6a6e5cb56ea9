"""Targets that are a config.json with `quantization_config`, and safetensors files."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.packed.encoding.integrity import build_metadata, open_safetensors, verify_files
from fp4dit.packed.targets.base import StoredLayer, StoredModel, Target
from fp4dit.packed.targets.folders import read_config, read_saved_dtype
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import save_tensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class ConfigTarget(Target):
    """A target that diffusers recognizes by the `quant_method` of config.json.

    The files that are written have the checksums of packed checkpoints, which other readers ignore.

    Attributes:
        quant_method: The name of the method in config.json.
    """

    quant_method: ClassVar[str]

    @abstractmethod
    def build_config(self, model: StoredModel) -> dict[str, Any]:
        """Return the `quantization_config`, without `quant_method`."""

    @abstractmethod
    def read_settings(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Any] | None:
        """Return what a `quantization_config` says about a layer; None if it is not quantized.

        Args:
            name: The name of the layer.
            config: The `quantization_config`.
            tensors: The tensors of the layer, by the suffix of their names.

        Raises:
            UserError: if it says something that cannot be represented here.
        """

    def write(self, model: StoredModel, folder: Path) -> None:
        state, config = self.build_files(model)
        text = json.dumps(config, indent=2)
        metadata = {"format": "pt", **build_metadata(state, json.loads(text))}
        metadata |= self.build_file_metadata(model, state)
        save_tensors(state, folder / WEIGHTS_FILE, metadata)
        (folder / "config.json").write_text(text + "\n")

    def build_files(self, model: StoredModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of the weights' file by name, and the contents of config.json."""
        state = dict(model.others)
        for name, layer in model.layers.items():
            for suffix, value in layer.tensors.items():
                state[f"{name}.{suffix}"] = value
        state = {name: value.contiguous() for name, value in state.items()}
        quantization = {"quant_method": self.quant_method, **self.build_config(model)}
        return state, {**model.config, "quantization_config": quantization}

    def build_file_metadata(
        self, model: StoredModel, state: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """Return what the metadata of the weights' file contains besides checksums."""
        return {}

    def reads(self, folder: Path) -> bool:
        config = read_config(folder).get("quantization_config", {})
        return config.get("quant_method") == self.quant_method

    def read(self, folder: Path, skeleton: nn.Module) -> StoredModel:
        return self.parse_files(
            read_state(folder), read_config(folder), skeleton, read_saved_dtype(folder)
        )

    def write_example(self, class_name: str, pipeline: str | None, dtype: torch.dtype) -> str:
        loader = pipeline or class_name
        name = "pipe" if pipeline else "transformer"
        return (
            f"import torch\nfrom diffusers import {loader}\n\n"
            f'{name} = {loader}.from_pretrained("this/folder", dtype={dtype})'
        )

    def parse_files(
        self,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        skeleton: nn.Module,
        dtype: torch.dtype,
    ) -> StoredModel:
        """Return the transformer of tensors and the contents of config.json.

        Raises:
            UserError: if a layer cannot be represented here.
        """
        plain = dict(config)
        quantization = plain.pop("quantization_config")
        tensors_by_layer, layers, others = group_by_layer(state), {}, dict(state)
        for name, source in find_layers(skeleton).items():
            tensors = tensors_by_layer.get(name, {})
            settings = self.read_settings(name, quantization, tensors)
            if settings is None:
                continue
            shape = tuple(source.weight.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
            layers[name] = StoredLayer(shape, tensors, settings)
            for suffix in tensors:
                del others[f"{name}.{suffix}"]
        left = [name for name in find_layers(skeleton) if name not in layers]
        return StoredModel(plain, dtype, layers, others, left)


def group_by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer except its bias, by the suffix of their names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, suffix = key.rpartition(".")
        if suffix != "bias":
            groups.setdefault(name, {})[suffix] = value
    return groups


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all safetensors files in a folder.

    If fp4dit wrote them, their checksums are verified.

    Raises:
        UserError: if a file is damaged.
    """
    paths, state = sorted(folder.glob("*.safetensors")), {}
    if not paths:
        raise UserError(f"{folder} has no safetensors file")
    if all(was_written_here(path) for path in paths):
        verify_files(paths, read_config(folder))
    for path in paths:
        try:
            state |= load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return state


def was_written_here(path: Path) -> bool:
    """Return whether a safetensors file has checksums of fp4dit."""
    with open_safetensors(path) as (header, _):
        metadata = header.get("__metadata__")
        return isinstance(metadata, dict) and "fp4dit" in metadata
