"""Linear layers with a separate quantized copy per timestep range (ViDiT-Q, arXiv:2406.02540).

Each copy has its own transforms, hard weight and static qparams.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from fp4dit.quantization.layers import QuantLayer, QuantLinearBase
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.utils.errors import UserError


class TimestepRangeLinear(nn.Module):
    """Linear layer with one quantized copy per range of timesteps (ViDiT-Q, arXiv:2406.02540).

    Each row of a batch goes through the copy for the range of its timestep. The memory for weights
    is proportional to the number of ranges.

    Args:
        layers: One layer per range.
        range_ends: Last timestep of each range but the last one, ascending.
        context: Context that holds the current timestep.

    Example:
        >>> layer = TimestepRangeLinear([early, late], [499], context)
        >>> context.update(torch.tensor([120, 800]))
        >>> y = layer(x)  # the first row through `early`, the second one through `late`
    """

    def __init__(
        self,
        layers: Sequence[QuantLinearBase],
        range_ends: Sequence[int | float],
        context: TimestepContext,
    ) -> None:
        super().__init__()
        self.ranges = nn.ModuleList(layers)
        self.range_ends = torch.tensor(range_ends, dtype=torch.float32)
        self.context = context

    @property
    def weight(self) -> Tensor:
        """Weight of the first layer, for code that reads the dtype and device of a layer."""
        return self.layers[0].weight  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> list[QuantLinearBase]:
        """The layers of the ranges, in order."""
        return list(self.ranges)  # pyright: ignore[reportReturnType]

    def range_index(self, timestep: Shaped[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Return the index of the range that each timestep is in."""
        return torch.bucketize(timestep.float(), self.range_ends.to(timestep.device))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        index = self.range_index(self.context.timestep)
        index = index.repeat_interleave(len(x) // len(index))
        rows_by_range = [(index == i).nonzero()[:, 0] for i in range(len(self.ranges))]
        # All rows are in one range while sampling, because they are at the same timestep.
        if len(x) in map(len, rows_by_range):
            return self.layers[int(index[0])](x)
        outputs = []
        for layer, layer_rows in zip(self.layers, rows_by_range, strict=True):
            if len(layer_rows):
                outputs.append(layer(x[layer_rows]))
        return torch.cat(outputs)[torch.cat(rows_by_range).argsort()]  # in the original order


def rows_per_range(
    module: nn.Module, timestep: Shaped[Tensor, "n"]
) -> Iterator[tuple[QuantLayer, Bool[Tensor, "n"]]]:
    """Iterate over the quantized layers of `module`, each with the mask of the rows it processes.

    Args:
        module: A quantized layer, a layer with timestep ranges, or any other module, which has no
            quantized layers.
        timestep: Timestep of each calibration row.

    Raises:
        UserError: If there is no row for one of several ranges, so that it cannot be calibrated.
    """
    if isinstance(module, QuantLayer):
        yield module, torch.ones_like(timestep, dtype=torch.bool)
    if isinstance(module, TimestepRangeLinear):
        index = module.range_index(timestep)
        for i, layer in enumerate(module.layers):
            if not (index == i).any():
                raise UserError(
                    f"no calibration call is in range {i + 1} of {len(module.ranges)} of the "
                    f"timesteps, which end at {module.range_ends.tolist()}: the calls reach from "
                    f"{timestep.min():.0f} to {timestep.max():.0f}"
                )
            yield layer, index == i  # pyright: ignore[reportReturnType]


def named_quant_layers(name: str, module: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Iterate over the quantized layers of `module`, which is called `name`, with their names."""
    if isinstance(module, QuantLayer):
        yield name, module
    if isinstance(module, TimestepRangeLinear):
        for i, layer in enumerate(module.layers):
            yield f"{name}.ranges.{i}", layer  # pyright: ignore[reportReturnType]


def base_layer_name(name: str) -> str:
    """Return the name of a layer without the suffix of its timestep range."""
    return name.partition(".ranges.")[0]
