"""Targets that are one file of weights, which diffusers reads by `from_single_file`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from fp4dit.packed.targets.base import Target
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class SingleFileTarget(Target):
    """A target that diffusers does not recognize by itself: the caller names its config class.

    Attributes:
        file_name: The name of the file beside config.json.
        config_class: The name of the class of its quantization config in diffusers.
    """

    file_name: ClassVar[str]
    config_class: ClassVar[str]

    def check_model(self, class_name: str) -> None:
        if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
            raise UserError(
                f"diffusers reads {self.name} by from_single_file, which {class_name} does not "
                "have: use export_format=sdnq"
            )

    def write_example(self, class_name: str, pipeline: str | None, dtype: torch.dtype) -> str:
        folder = "this/folder/transformer" if pipeline else "this/folder"
        classes = ", ".join(
            sorted([class_name, self.config_class, *([pipeline] if pipeline else [])])
        )
        code = (
            f"import torch\nfrom diffusers import {classes}\n\n"
            f"transformer = {class_name}.from_single_file(\n"
            f'    "{folder}/{self.file_name}",\n'
            f'    config="{folder}",\n'
            f"    quantization_config={self.config_class}(compute_dtype={dtype}),\n"
            f"    dtype={dtype},\n)"
        )
        if pipeline is None:
            return code
        return (
            f"{code}\npipe = {pipeline}.from_pretrained(\n"
            f'    "this/folder", transformer=transformer, dtype={dtype}\n)'
        )
