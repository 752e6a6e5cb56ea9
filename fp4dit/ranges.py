"""Layers that are others in each range of timesteps: their transforms, their hard weights, their static inputs."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.layer import Entrance, QuantLayer


class Ranges(nn.Module):
    """One quantized layer for each range of timesteps; a row goes through that of its time (ViDiT-Q,
    arXiv:2406.02540). It costs as many weights as there are ranges.

    `ends` are the last timesteps of all ranges but the last one, ascending.
    """

    def __init__(self, layers: Sequence[Entrance], ends: Sequence[int | float], clock: Clock) -> None:
        super().__init__()
        self.ranges, self.ends, self.clock = nn.ModuleList(layers), torch.tensor(ends, dtype=torch.float32), clock

    @property
    def weight(self) -> Tensor:
        return self.layers[0].weight  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> list[Entrance]:
        return list(self.ranges)  # pyright: ignore[reportReturnType]

    def which(self, timestep: Shaped[Tensor, "n"]) -> Int[Tensor, "n"]:
        return torch.bucketize(timestep.float(), self.ends.to(timestep.device))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        which = self.which(self.clock.now)
        which = which.repeat_interleave(len(x) // len(which))
        rows = [(which == i).nonzero()[:, 0] for i in range(len(self.ranges))]
        if len(x) in map(len, rows):  # as when sampling: all rows are at one time
            return self.layers[int(which[0])](x)
        made = [layer(x[index]) for layer, index in zip(self.layers, rows, strict=True) if len(index)]
        return torch.cat(made)[torch.cat(rows).argsort()]


def shares(module: nn.Module, timestep: Shaped[Tensor, "n"]) -> Iterator[tuple[QuantLayer, Bool[Tensor, "n"]]]:
    """The quantized layers that a quantized module consists of, and which rows each gets.

    Raises:
        UserError: if one of several gets none, for nothing could be measured for it.
    """
    if isinstance(module, QuantLayer):
        yield module, torch.ones_like(timestep, dtype=torch.bool)
    if isinstance(module, Ranges):
        which = module.which(timestep)
        for i, layer in enumerate(module.layers):
            if not (which == i).any():
                raise UserError(
                    f"no calibration call is in range {i + 1} of {len(module.ranges)} of the timesteps, which end at "
                    f"{module.ends.tolist()}: the calls reach from {timestep.min():.0f} to {timestep.max():.0f}"
                )
            yield layer, which == i  # pyright: ignore[reportReturnType]


def names(name: str, module: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """The quantized layers that a quantized module consists of, by name."""
    if isinstance(module, QuantLayer):
        yield name, module
    if isinstance(module, Ranges):
        yield from ((f"{name}.ranges.{i}", layer) for i, layer in enumerate(module.layers))  # pyright: ignore


def whole(name: str) -> str:
    """The name of the layer that a range is of, or its own."""
    return name.partition(".ranges.")[0]
