"""`quantization_config` in the config.json of a packed model, for diffusers and transformers."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import nn

from fp4dit.packed.encoding import integrity
from fp4dit.packed.encoding.schema import from_tagged_json, to_tagged_json
from fp4dit.packed.model import ModelDescription
from fp4dit.packed.quantize import AssignedRules
from fp4dit.utils.errors import UserError


class QuantMethod(str, Enum):  # noqa: UP042, both libraries expect a str with a `.value`
    """Name of the quantization method in config.json."""

    FP4DIT = "fp4dit"
    ON_LOAD = "fp4dit_on_load"  # never in a config.json, because a quantized model is packed


class PackedConfigMixin:
    """Model description as JSON, with the version of the checkpoint.

    The config classes for diffusers and transformers derive from it.

    Raises:
        UserError: if the checkpoint has another version.
    """

    def __init__(
        self,
        version: int,
        weights: Sequence[Any],
        inputs: Sequence[Any],
        quant_method: str = "fp4dit",
        **others: Any,
    ) -> None:
        self.quant_method = QuantMethod.FP4DIT  # pyright: ignore[reportAttributeAccessIssue]
        if version != integrity.VERSION:
            raise UserError(
                f"this checkpoint's layout has version {version}, and this fp4dit reads version "
                f"{integrity.VERSION}: install the fp4dit that wrote it, or export it again"
            )
        if others:
            raise UserError(
                f"quantization_config.{min(others)} is not something that fp4dit writes: the file "
                "was changed"
            )
        self.version, self.weights, self.inputs = version, weights, inputs

    @classmethod
    def from_description(cls, description: ModelDescription) -> Any:
        """Make the config of a packed model."""
        spec = to_tagged_json(description)
        return cls(integrity.VERSION, spec["weights"], spec["inputs"])

    @property
    def description(self) -> ModelDescription:
        """The description of the model.

        Raises:
            UserError: if the JSON is not a description.
        """
        spec = {"kind": "packed_description", "weights": self.weights, "inputs": self.inputs}
        return from_tagged_json(spec, ModelDescription)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of the config."""
        config = {
            "quant_method": self.quant_method.value,
            "version": self.version,
            "weights": self.weights,
            "inputs": self.inputs,
        }
        return json.loads(json.dumps(config))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the JSON of the config. Both libraries call this to save a model."""
        return self.to_dict()


class OnLoadConfigMixin(ABC):
    """Config by which a model is quantized while it is loaded. It quantizes without calibration.

    Example:
        See `fp4dit.QuantizationConfig`.
    """

    @abstractmethod
    def assign_rules(self, model: nn.Module) -> AssignedRules:
        """Return the rules that quantize a model, which has no weights yet.

        Raises:
            UserError: if the model cannot be quantized by this config.
        """


def require_prequantized(pre_quantized: bool) -> None:
    """Raise UserError if a model is loaded whose weights are not packed yet."""
    if not pre_quantized:
        raise UserError(
            "this quantization_config describes weights that are packed, and those of the model "
            "are not: to quantize them give fp4dit.QuantizationConfig(method), or use "
            "fp4dit.quantize(pipe, method, prompts=...) for a method that calibrates"
        )


def require_one_device(device_map: Any) -> None:
    """Raise UserError if a model that is quantized while loading would be spread over devices.

    Args:
        device_map: A device for each part of the model. Anything but a mapping is accepted, because
            it does not tell the devices.
    """
    if not isinstance(device_map, Mapping):
        return
    devices = {str(device) for device in device_map.values()}
    if len(devices) > 1 or "disk" in devices:
        raise UserError(
            f"a model cannot be quantized while it is loaded to {', '.join(sorted(devices))}: load "
            "it to one device and save it; the packed model can be loaded with any device_map"
        )
