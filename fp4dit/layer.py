"""The one quantized layer: a linear or convolution layer whose weight, and perhaps input, lies on a grid."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fp4dit.errors import UserError
from fp4dit.quantizer import Quantizer
from fp4dit.rounding import AdaRound, Learner
from fp4dit.scales import Scaling, from_parts, parts


class Activation(nn.Module):
    """Quantizes what flows through it: online while it holds no scaling, statically once it holds one."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.scaling: Scaling | None = None

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.quantizer(x, self.scaling)

    def _apply(self, fn, recurse: bool = True):
        # The scaling is an object of tensors, not a buffer: what moves the module must move it too.
        if self.scaling is not None:
            self.scaling = from_parts({name: fn(value) for name, value in parts(self.scaling).items()})
        return super()._apply(fn, recurse)


class QuantLayer(nn.Module):
    """Wraps a layer. Until `freeze` its weight is the original one, seen through `rounding` if that learns.

    Rows of the weight are its output channels, flattened: groups run along what one output sums over.
    """

    def __init__(self, source: nn.Linear | nn.Conv2d, quantizer: Quantizer) -> None:
        super().__init__()
        self.source, self.quantizer = source.requires_grad_(False), quantizer
        for name, value in parts(quantizer.scaling(self.rows)).items():
            self.register_buffer(f"weight_{name}", value)
        self.activation: nn.Module = nn.Identity()
        self.rounding: AdaRound | None = None

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
    def scaling(self) -> Scaling:
        return from_parts({name.removeprefix("weight_"): value for name, value in self.named_buffers(recurse=False)})

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.compute(self.activation(x), self.current())

    def compute(self, x: Float[Tensor, "*batch i"], weight: Tensor) -> Float[Tensor, "*batch o"]:
        return F.linear(x, weight, self.bias)

    def current(self) -> Tensor:
        if self.rounding is None:
            return self.weight
        return self.rounding().view_as(self.weight).to(self.weight.dtype)

    def learn(self, learner: Learner) -> AdaRound:
        blocks = self.quantizer.granularity.split(self.rows).float()
        self.rounding = learner(blocks, self.quantizer.format, self.scaling)
        return self.rounding

    @torch.no_grad()
    def freeze(self) -> None:
        """Write the hard weights: as learnt, else rounded to nearest. Freezing twice changes nothing."""
        if self.rounding is None:
            hard = self.quantizer(self.rows, self.scaling)
        else:
            hard = self.rounding.hard().to(self.weight.dtype)
        self.source.weight.copy_(hard.view_as(self.weight))
        self.rounding = None


class QuantConv(QuantLayer):
    """A convolution, computed as the matrix product it is, so that a token of its input is one patch."""

    source: nn.Conv2d

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o y x"]:
        if isinstance(self.activation, nn.Identity):
            return self.compute(x, self.current())
        conv = self.source
        padding: tuple[int, ...] = conv.padding  # pyright: ignore[reportAssignmentType]
        geometry = (conv.dilation, padding, conv.stride)
        patches = self.activation(F.unfold(x, conv.kernel_size, *geometry).mT)
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, d, p, s in zip(x.shape[2:], conv.kernel_size, *geometry, strict=True)
        )
        return F.linear(patches, self.current().flatten(1), self.bias).mT.unflatten(2, (rows, columns))

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(self.source, {"weight": weight}, (x,))


def wrap(source: nn.Module, quantizer: Quantizer) -> QuantLayer:
    if not isinstance(source, nn.Conv2d):
        return QuantLayer(source, quantizer)  # pyright: ignore[reportArgumentType]
    if source.groups != 1 or source.padding_mode != "zeros" or isinstance(source.padding, str):
        raise UserError(
            f"{source} cannot be quantized: only convolutions without groups, padded with so many zeros, can"
        )
    return QuantConv(source, quantizer)
