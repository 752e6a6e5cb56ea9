"""Read rows of single weights from the safetensors files of a pipeline, without loading it."""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from fp4dit.models.hub_files import TRANSFORMER, find_config
from fp4dit.quantization.format_forecast import space_evenly

WeightMatrix = Float[Tensor, "o k"]


class WeightFiles:
    """The weights of a component of a pipeline, in files on this machine.

    Args:
        files: The safetensors files. If several have a tensor, such as in two dtypes, the first
            one counts.

    Example:
        >>> files = WeightFiles.find("pkg://fp4dit/worlds/shapes/weights")
        >>> files.read_rows("transformer_blocks.0.ff.net.2", count=4).shape
        torch.Size([4, 1024])
    """

    def __init__(self, files: list[Path]) -> None:
        self.file_of: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    self.file_of.setdefault(key, path)

    @classmethod
    def find(cls, path: str, component: str = TRANSFORMER) -> "WeightFiles | None":
        """Return the files of a component; None if there are none on this machine.

        Args:
            path: A folder, a hub id, or `pkg://package/folder`.
            component: The component of the pipeline.
        """
        config = find_config(path, f"{component}/config.json")
        files = sorted(config.parent.glob("*.safetensors")) if config else []
        return cls(files) if files else None

    def read_rows(self, layer: str, count: int | None = None) -> WeightMatrix | None:
        """Return rows of a layer's weight, evenly spaced, in fp32.

        Args:
            layer: The name of the layer.
            count: The number of rows; None, or more than there are, for all of them.

        Returns:
            The rows, each flattened; None if there is no such weight, or it has no rows.
        """
        key = f"{layer}.weight"
        if key not in self.file_of:
            return None
        with safe_open(self.file_of[key], "pt") as file:
            weight = file.get_slice(key)
            rows, *others = weight.get_shape()
            if not others:
                return None
            if count is None or count >= rows:
                return weight[:].flatten(1).float()
            return torch.cat(
                [weight[i : i + 1].flatten(1) for i in space_evenly(rows, count)]
            ).float()
