"""What a packed model's config.json says, to diffusers and to transformers alike, in their own config classes."""

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

from fp4dit.errors import UserError
from fp4dit.packed import checkpoint
from fp4dit.packed.description import Description
from fp4dit.packed.spec import describe, made


class Method(str, Enum):  # noqa: UP042, a str of which `.value` is one, as both have it
    FP4DIT = "fp4dit"


class Config:
    """`quantization_config`: a `Description` as JSON, and the layout's version.

    Raises:
        UserError: if it is of another version.
    """

    def __init__(
        self, version: int, weights: Sequence[Any], inputs: Sequence[Any], quant_method: str = "fp4dit", **others: Any
    ) -> None:
        self.quant_method = Method.FP4DIT  # pyright: ignore[reportAttributeAccessIssue]
        if version != checkpoint.VERSION:
            raise UserError(
                f"this checkpoint's layout has version {version}, and this fp4dit reads version {checkpoint.VERSION}: "
                "install the fp4dit that wrote it, or export it again"
            )
        if others:
            raise UserError(f"quantization_config.{min(others)} is nothing that fp4dit writes: the file was changed")
        self.version, self.weights, self.inputs = version, weights, inputs

    @classmethod
    def of(cls, description: Description) -> Any:
        found = describe(description)
        return cls(checkpoint.VERSION, found["weights"], found["inputs"])

    @property
    def description(self) -> Description:
        """Raises UserError if it is none."""
        return made({"kind": "Description", "weights": self.weights, "inputs": self.inputs}, Description)

    def to_dict(self) -> dict[str, Any]:
        kept = {"version": self.version, "weights": self.weights, "inputs": self.inputs}
        return json.loads(json.dumps({"quant_method": self.quant_method.value, **kept}))

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def check_packed(pre_quantized: bool) -> None:
    """Raises UserError if a model is to be loaded whose weights are not packed yet."""
    if not pre_quantized:
        raise UserError(
            "fp4dit does not quantize while a model is loaded, for it calibrates: run "
            "python -m pipelines.run targets=[export], and load the folder that it makes"
        )
