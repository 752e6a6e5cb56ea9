"""Layers and activations of known models, for tables of them without the code of the models.

Importing diffusers takes longer than making such a table. `python -m benchmarks.outlines` writes
the files.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp4dit.models.hub_files import PUBLISHED, TRANSFORMER_CONFIG, find_config
from fp4dit.utils.files import atomic_write, read_json

OUTLINES = PUBLISHED / "outlines"

# Keys of a transformer's config that do not change the model.
UNIMPORTANT_KEYS = ("_diffusers_version", "_name_or_path")

# Options of `conf/model` that change neither layers nor shapes.
OTHER_OPTIONS = ("_target_", "base", "dtype", "embeddings", "path", "pickle")

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class ModelOutline:
    """The layers of a transformer and the shapes of its activations.

    Attributes:
        target: Class of the model's source, such as `fp4dit.models.PixArt`.
        options: Options of the source that the shapes depend on.
        config_hash: Hash of the transformer's config.
        layers: Shape of the weight of each layer.
        num_other_parameters: Number of parameters that are not weights of layers.
        activations: Shape, for one sample, of each activation that can be quantized if all layers
            are quantized.

    Example:
        >>> outline = ModelOutline.read(OUTLINES / "dit_xl_2.json")
        >>> outline.build_module().get_submodule("proj_out_2")
        Linear(in_features=1152, out_features=32, bias=False)
    """

    target: str
    options: Mapping[str, Any]
    config_hash: str
    layers: Shapes
    num_other_parameters: int
    activations: Shapes

    @classmethod
    def read(cls, path: Path) -> "ModelOutline":
        """Read the file of an outline."""
        values = read_json(path)
        shapes = {name: expand_shapes(values[name]) for name in ("layers", "activations")}
        return cls(**values | shapes)

    def write(self, path: Path) -> None:
        """Write the outline to a file, with one line for equal layers of successive blocks."""
        values = vars(self) | {
            "layers": compress_shapes(self.layers),
            "activations": compress_shapes(self.activations),
        }
        with atomic_write(path) as part:
            part.write_text(json.dumps(values, indent=1) + "\n")

    def build_module(self) -> nn.Module:
        """Return a module on the meta device with these layers, and as many other parameters."""
        root = nn.Module()
        for name, shape in self.layers.items():
            *parents, last = name.split(".")
            module = root
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.add_module(last, build_layer(shape))
        other = torch.empty(self.num_other_parameters, device="meta")
        root.register_parameter("other", nn.Parameter(other))
        return root

    def select_activations(self, quantized: Collection[str]) -> dict[str, torch.Size]:
        """Return the shapes of the activations that can be quantized if only some layers are."""
        shapes = {}
        for name, shape in self.activations.items():
            if name not in self.layers or name in quantized:
                shapes[name] = shape
        return shapes


def find_outline(model: Mapping[str, Any]) -> ModelOutline | None:
    """Return the outline of a model if there is one, and its config is on this machine.

    Args:
        model: The node `model` of a config.
    """
    file = find_config(model["path"], TRANSFORMER_CONFIG)
    if file is None:
        return None
    key = (model["_target_"], select_shape_options(model), hash_config(read_json(file)))
    for path in sorted(OUTLINES.glob("*.json")):
        outline = ModelOutline.read(path)
        if (outline.target, outline.options, outline.config_hash) == key:
            return outline
    return None


def select_shape_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model that its shapes depend on."""
    return {name: value for name, value in model.items() if name not in OTHER_OPTIONS}


def hash_config(config: Mapping[str, Any]) -> str:
    """Return the hash of the entries of a transformer's config that change the model."""
    entries = {name: value for name, value in config.items() if name not in UNIMPORTANT_KEYS}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


def build_layer(shape: torch.Size) -> nn.Module:
    """Return a linear layer or a convolution on the meta device, whose weight has this shape."""
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False, device="meta")
    outputs, inputs, *kernel = shape
    return nn.Conv2d(inputs, outputs, tuple(kernel), bias=False, device="meta")  # pyright: ignore


def compress_shapes(shapes: Shapes) -> dict[str, str]:
    """Join equal shapes of successive blocks: `blocks.0-27.attn.q` stands for 28 of them."""
    ranges: dict[tuple[str, str, str], list[list[int]]] = {}
    # From the end, because a last block may have more layers than a first one, and the order of
    # its layers is kept.
    for name, shape in reversed(list(shapes.items())):
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        prefix, number, suffix = match.groups() if match else (name, "0", "")
        numbers = ranges.setdefault((prefix, suffix, "x".join(map(str, shape))), [])
        if not numbers or numbers[-1][0] != int(number) + 1:
            numbers.append([int(number), int(number)])
        numbers[-1][0] = int(number)
    texts = {}
    for (prefix, suffix, shape), numbers in reversed(list(ranges.items())):
        for first, last in reversed(numbers):
            texts[f"{prefix}{first}-{last}{suffix}" if suffix else prefix] = shape
    return texts


def expand_shapes(texts: Mapping[str, str]) -> dict[str, torch.Size]:
    """Undo `compress_shapes`."""
    shapes = {}
    for text, shape in texts.items():
        for name in expand_name(text):
            shapes[name] = torch.Size(map(int, shape.split("x")))
    return shapes


def expand_name(text: str) -> Iterator[str]:
    """Yield the names that a text with a range stands for."""
    match = re.fullmatch(r"(.*?\.)(\d+)-(\d+)(\..*)", text)
    if match is None:
        yield text
        return
    prefix, first, last, suffix = match.groups()
    for number in range(int(first), int(last) + 1):
        yield f"{prefix}{number}{suffix}"
