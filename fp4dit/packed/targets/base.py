"""Base of the targets: formats of other libraries that hold packed layers exactly."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.packed.encoding.layout import Layout, PackedBuffers
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.grid import GridWeight, matrix_shape, pack_grid
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.base import Transform, TransformSpec
from fp4dit.utils.errors import UserError

FittedTransform = tuple[TransformSpec, Transform]


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a target stores it.

    Attributes:
        shape: The shape of the plain weight.
        tensors: The tensors of the weight, by the suffix of their names.
        settings: What the target's config says about the layer.
    """

    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredModel:
    """A transformer as a target stores it.

    Attributes:
        config: The config of the plain model, as in config.json.
        dtype: The dtype of everything that is not quantized, in which the weights are exact.
        layers: The quantized layers, by name.
        others: All other tensors, by name.
        left: The names of the linear and convolution layers that are not quantized.
        inputs: The rules of the inputs that readers quantize, by layer.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype
    layers: Mapping[str, StoredLayer]
    others: Mapping[str, Tensor]
    left: Sequence[str]
    inputs: Mapping[str, Rule] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """The name of the model's class in diffusers."""
        return self.config["_class_name"]


@dataclass(frozen=True)
class Target(ABC):
    """A format of another library, in which a layer has exactly the same weight or is refused.

    A subclass says how a layer is stored and what its readers compute. `store` and `restore`
    compare the two to the bit, so that a mistake or a rounding is refused, and never another
    weight.

    Attributes:
        name: The word for the target in configs.
        packages: The packages that readers need, as arguments of `pip install`.
        inputs_note: What readers do with inputs that are quantized here, as a clause.
        holds_transforms: Whether a layer may transform its input.

    Example:
        See `fp4dit.packed.targets.sdnq.SDNQ`.
    """

    name: ClassVar[str]
    packages: ClassVar[str]
    inputs_note: ClassVar[str] = "its readers leave them in 16 bits"
    holds_transforms: ClassVar[bool] = False

    def check_model(self, class_name: str) -> None:  # noqa: B027, most targets hold every model
        """Raise a UserError if readers cannot load models of this class of diffusers."""

    def check_stored(self, model: StoredModel) -> None:  # noqa: B027, most formats mix freely
        """Raise a UserError if layers that can be stored cannot be in the same model."""

    @abstractmethod
    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        """Encode a layer.

        Args:
            layer: The packed layer.
            shape: The shape of the plain weight.

        Raises:
            UserError: if it cannot be stored. The message has the reason, and the override with
                which it can be if there is one.
        """

    @abstractmethod
    def decode(self, stored: StoredLayer) -> GridWeight:
        """Return the weight that the tensors of `encode` hold.

        Raises:
            UserError: if the tensors do not have this format.
            KeyError: if a tensor is missing.
        """

    @abstractmethod
    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        """Return the weight that diffusers computes with if it loads the model in `dtype`."""

    def read_weight(self, stored: StoredLayer) -> Float[Tensor, "o k"]:
        """Return the weight that the tensors mean, in fp32."""
        return self.dequantize(stored, torch.float32)

    def restore_transforms(self, stored: StoredLayer) -> Sequence[FittedTransform]:
        """Return the transforms of a layer with their specs, in the order of the chain.

        Raises:
            UserError: if they cannot be represented here exactly.
        """
        return ()

    @abstractmethod
    def describe(self, stored: StoredLayer) -> str:
        """Return in a few words how a layer is stored, such as "int8 in rows"."""

    def stores_input(self, stored: StoredLayer) -> bool:
        """Return whether readers quantize the input of a layer bit-exactly as it is here."""
        return False

    def quantizes_input(self, stored: StoredLayer) -> bool:
        """Return whether some readers quantize the input of a layer, in whichever way."""
        return False

    @abstractmethod
    def write(self, model: StoredModel, folder: Path) -> None:
        """Write a transformer into an empty folder."""

    @abstractmethod
    def reads(self, folder: Path) -> bool:
        """Return whether a folder holds a transformer in this format."""

    @abstractmethod
    def read(self, folder: Path, skeleton: nn.Module) -> StoredModel:
        """Read a transformer.

        Args:
            folder: The folder.
            skeleton: The plain model of its config.json, without weights.

        Raises:
            UserError: if it is not in this format, or is damaged.
        """

    @abstractmethod
    def write_example(self, class_name: str, pipeline: str | None, dtype: torch.dtype) -> str:
        """Return Python code that loads `this/folder`.

        Args:
            class_name: The name of the transformer's class in diffusers.
            pipeline: The name of the pipeline's class, which the code calls `pipe`; None if the
                folder is that of the transformer, which the code calls `transformer`.
            dtype: The dtype in which the weights are exact.
        """

    def store(self, layer: PackedLinear, shape: tuple[int, ...], dtype: torch.dtype) -> StoredLayer:
        """Encode a layer, and check that readers get exactly its weight in `dtype`.

        Raises:
            UserError: if it cannot be stored, or would be another weight.
        """
        if layer.dtype != dtype:
            raise UserError(
                f"it is computed in {layer.dtype}, and the rest of the model in {dtype}: "
                "export_format.dense=[...] writes it as a plain weight"
            )
        stored, weight = self.encode(layer, shape), layer.dequantize(dtype).cpu()
        for theirs in (self.dequantize(stored, dtype), self.read_weight(stored).to(dtype)):
            if not theirs.equal(weight):
                raise UserError(self.explain_difference(stored, dtype))
        return stored

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        """Return why readers of this format would get another weight than was packed."""
        return f"its readers would round the weight otherwise in {dtype}"

    def restore(self, stored: StoredLayer) -> tuple[Layout, PackedBuffers]:
        """Decode a layer, and check that its packed weight is exactly the stored one.

        Raises:
            UserError: if it cannot be packed, or would be another weight.
        """
        layout, buffers = pack_grid(self.decode(stored))
        _, k = matrix_shape(stored.shape)
        weight = layout.dequantize(buffers, k, layout.build_lookup_table())
        if not weight.equal(self.read_weight(stored)):
            raise UserError(
                "a packed weight cannot be equal to it, because the two are rounded otherwise"
            )
        return layout, buffers
