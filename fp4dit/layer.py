"""The one quantized layer: a linear or convolution layer whose weight, and perhaps input, lies on a grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.grid import Grid
from fp4dit.quantizer import Quantizer
from fp4dit.rounding import Learner, Rounder, Rounding, nearest
from fp4dit.transforms import Transform, TransformSpec


class Entrance(nn.Module):
    """How a layer's input reaches its product, however the weight is kept: by `transforms`, then `activation`."""

    transforms: nn.ModuleList
    activation: nn.Module

    @property
    def chain(self) -> list[Transform]:
        return list(self.transforms)  # pyright: ignore[reportReturnType]

    @property
    def width(self) -> int:
        """How many values one output sums over."""
        raise NotImplementedError

    def transformed(self, x: Float[Tensor, "*b k"]) -> tuple[Float[Tensor, "*b k"], Float[Tensor, "*b o"] | None]:
        """What the transforms make of the input, and what they lead around the product."""
        around = None
        for transform in self.chain:
            bypass = transform.bypass(x)
            around = bypass if around is None else around if bypass is None else around + bypass
            x = transform.activation(x)
        return x, around


Pair = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Of a convolution, as torch's layers have it."""

    kernel_size: Pair
    dilation: Pair
    padding: Pair
    stride: Pair


class Convolution:
    """A convolution, computed as the matrix product it is, so that a token of its input is one patch."""

    geometry: nn.Conv2d | Geometry

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o y x"]:
        own = self.geometry
        padding: tuple[int, ...] = own.padding  # pyright: ignore[reportAssignmentType]
        sides = zip(x.shape[2:], own.kernel_size, own.dilation, padding, own.stride, strict=True)
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in sides]
        return super().forward(self.tokens(x)).mT.unflatten(2, size)  # pyright: ignore[reportAttributeAccessIssue]

    def tokens(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n p k"]:
        own = self.geometry
        return F.unfold(x, own.kernel_size, own.dilation, own.padding, own.stride).mT  # pyright: ignore[reportArgumentType]


class QuantLayer(Entrance):
    """Wraps a layer. After `prepare`, and until `freeze`, its weight is the transformed one in full precision, seen
    through `rounding` if that learns: hard, but for steps that `soften` it.

    Rows of the weight are its output channels, flattened: groups run along what one output sums over.
    """

    def __init__(
        self, source: nn.Linear | nn.Conv2d, quantizer: Quantizer, transforms: Sequence[TransformSpec] = ()
    ) -> None:
        super().__init__()
        self.source = source.requires_grad_(False)
        self.transforms = nn.ModuleList(spec(*self.rows.shape) for spec in transforms)
        self.grid = Grid(quantizer)
        self.activation: nn.Module = nn.Identity()
        self.rounding: Rounder | None = None
        self.soft: Tensor | None = None  # the weight of the step being learnt

    @property
    def weight(self) -> Tensor:
        return self.source.weight

    @property
    def bias(self) -> Tensor | None:
        return self.source.bias

    @property
    def rows(self) -> Float[Tensor, "o k"]:
        return self.source.weight.flatten(1)

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @property
    def wants_inputs(self) -> bool:
        return bool(self.transforms) or self.static_input is not None

    @property
    def static_input(self) -> Grid | None:
        return self.activation if isinstance(self.activation, Grid) and self.activation.static else None

    def entered(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the activation would make of x, were these the values that it is measured on."""
        if self.static_input is None:
            return self.activation(x)
        return self.static_input.quantizer.settled(x)(x)

    @torch.no_grad()
    def prepare(self, x: Float[Tensor, "n ..."] | None = None) -> "QuantLayer":
        """Fit the transforms to a sample of inputs, and choose the scales of the weight and of a static activation."""
        x = None if x is None else self.tokens(x)
        for transform in self.chain:
            assert x is not None, "transforms are fitted to inputs"
            weight = self.rows.float()
            transform.fit(weight, x.float(), self.grid.quantizer.settled(weight), self.entered)
            self.write(transform.weight(weight))
            x = transform.activation(x)
        self.grid.measure(self.rows)
        if x is not None and self.static_input is not None:
            self.static_input.measure(x)
        return self

    def changed(self, weight: Float[Tensor, "o k"]) -> Float[Tensor, "o k"]:
        """What the transforms, once they are fitted, make of the weight in full precision."""
        weight = weight.float()
        for transform in self.chain:
            weight = transform.weight(weight)
        return weight

    def tokens(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n t k"]:
        """The input as rows of what one output sums over."""
        return x.reshape(len(x), -1, x.shape[-1])

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        entering, around = self.enter(x)
        return self.product(entering) if around is None else self.product(entering) + around

    def enter(self, x: Float[Tensor, "*b k"]) -> tuple[Float[Tensor, "*b k"], Float[Tensor, "*b o"] | None]:
        """The input as the product reads it, and what the transforms lead around the product."""
        x, around = self.transformed(x)
        return self.activation(x), around

    def product(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, self.current(), self.bias)

    def current(self) -> Float[Tensor, "o k"]:
        if self.rounding is None:
            return self.rows
        weight = self.rounding.hard() if self.soft is None else self.soft
        return weight.view_as(self.rows).to(self.product_dtype)

    @property
    def product_dtype(self) -> torch.dtype:
        """What autocast, or else the weight, has products computed in."""
        kind = self.weight.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if cast else self.weight.dtype

    def soften(self, beta: float | None) -> Float[Tensor, ""] | float:
        """Show the soft weight of one step, until `soft` is dropped; its indecision."""
        assert self.rounding is not None, "learn first"
        self.soft, indecision = self.rounding.soft(beta, self.product_dtype)
        return indecision

    def learn(self, learner: Learner) -> Rounder:
        blocks, scaling = self.grid.quantizer.granularity.split(self.rows).float(), self.grid.scaling
        assert scaling is not None, "prepare the layer first"
        self.rounding = learner(blocks, self.grid.format, scaling)
        return self.rounding

    @torch.no_grad()
    def write(self, weight: Float[Tensor, "..."]) -> None:
        self.source.weight.copy_(weight.view_as(self.source.weight))

    @torch.no_grad()
    def freeze(self, rounding: Rounding = nearest) -> None:
        """Write the hard weights: as learnt, else rounded. Freezing twice changes nothing."""
        if self.rounding is None:
            hard = self.grid(self.rows, rounding)
        else:
            hard = self.rounding.hard()
            if self.rounding.scaling is not None:
                self.grid.hold(self.rounding.scaling)
        self.write(hard)
        self.rounding = None


class QuantConv(Convolution, QuantLayer):
    source: nn.Conv2d

    @property
    def geometry(self) -> nn.Conv2d:
        return self.source


def wrap(source: nn.Module, quantizer: Quantizer, transforms: Sequence[TransformSpec] = ()) -> QuantLayer:
    check_source(source)
    kind = QuantConv if isinstance(source, nn.Conv2d) else QuantLayer
    return kind(source, quantizer, transforms)  # pyright: ignore[reportArgumentType]


def check_source(source: nn.Module) -> None:
    """Raises ValueError if there is no quantized layer for this one."""
    if isinstance(source, nn.Conv2d) and (
        source.groups != 1 or source.padding_mode != "zeros" or isinstance(source.padding, str)
    ):
        raise ValueError(
            "of convolutions, only those without groups and padded with so many zeros can be quantized: "
            "+weight.leave=[...] leaves others as they are"
        )
