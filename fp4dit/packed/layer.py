"""Layers whose weight is packed: what a quantized model is when nothing is to be learnt any more."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.errors import UserError
from fp4dit.layer import Convolution, Entrance, Geometry, QuantLayer
from fp4dit.packed.layout import Layout, pack
from fp4dit.packed.matmul import matmul
from fp4dit.scaling import Scaling
from fp4dit.transforms import Transform


class PackedLinear(Entrance, nn.Linear):
    """A quantized linear layer of `shape` o, k. Its packed weight, as `layout` has it, lies in buffers of bytes.

    It is a `nn.Linear`, so that adapters such as peft's LoRA find it. `dtype` is what the weight had before.
    """

    codes: UInt8[Tensor, "o b"]
    table: Tensor

    def __init__(
        self,
        layout: Layout,
        shape: tuple[int, int],
        bias: Tensor | None,
        transforms: Sequence[Transform],
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        nn.Module.__init__(self)
        self.layout, self.dtype = layout, dtype
        self.out_features, self.in_features = shape
        for name, size in layout.sizes(*shape).items():
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=device))
        self.register_buffer("table", layout.table(), persistent=False)
        self.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
        self.transforms = nn.ModuleList(transforms)
        self.activation: nn.Module = nn.Identity()

    @property
    def width(self) -> int:
        return self.in_features

    @property
    def held(self) -> dict[str, UInt8[Tensor, "..."]]:
        return {name: getattr(self, name) for name in self.layout.sizes(self.out_features, self.in_features)}

    @property
    def weight(self) -> Float[Tensor, "o k"]:
        """A stand-in of the weight's shape, dtype and device, for code that asks no more of it. Reading its values
        gives NaN, and writing them is an error: an adapter can be added to this layer, but not merged into it."""
        stand_in = torch.full((), torch.nan, dtype=self.dtype, device=self.codes.device)
        return stand_in.expand(self.out_features, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """A cast of the model leaves the bytes as they are, and changes what they are read as."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype  # pyright: ignore
        return super()._apply(fn, recurse)

    @property
    def scaling(self) -> Scaling:
        """That of the weight, read from its bytes."""
        shape = torch.Size([self.out_features, self.in_features])
        held, blocks = self.held, shape.numel() // self.layout.granularity.width(shape)
        return self.layout.scales(held, self.layout.kind(held, blocks))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        """The weight."""
        return self.layout.weight(self.held, self.in_features, self.table, dtype)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        entering, around = self.transformed(x)
        return matmul(self, entering) if around is None else matmul(self, entering) + around

    def extra_repr(self) -> str:
        names = "|".join(fmt.name for fmt in self.layout.formats)
        return f"{super().extra_repr()}, {names}, {self.layout.granularity}"


class PackedConv(Convolution, PackedLinear):
    geometry: Geometry


def geometry_of(conv: nn.Conv2d) -> Geometry:
    pairs = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return Geometry(*map(tuple, pairs))  # pyright: ignore[reportArgumentType]


def empty(
    source: nn.Linear | nn.Conv2d, layout: Layout, transforms: Sequence[Transform], device: torch.device | str = "meta"
) -> PackedLinear:
    """The packed layer in place of this one, its weight yet to be filled in."""
    shape = (source.weight.shape[0], source.weight[0].numel())
    kind = PackedConv if isinstance(source, nn.Conv2d) else PackedLinear
    made = kind(layout, shape, source.bias, transforms, source.weight.dtype, device)
    if isinstance(made, PackedConv) and isinstance(source, nn.Conv2d):
        made.geometry = geometry_of(source)
    return made


def packed(layer: QuantLayer) -> PackedLinear:
    """Raises UserError as `pack`."""
    layout, held = pack(layer.rows, layer.grid)
    made = empty(layer.source, layout, layer.chain, layer.weight.device)
    made.activation = layer.activation
    for name, value in held.items():
        getattr(made, name).copy_(value)
    return made


def pack_(model: nn.Module) -> dict[str, PackedLinear]:
    """Replace the quantized layers, whose weights are rounded, in place; what they were replaced by, by name.

    Raises:
        UserError: as `pack`, naming the layer.
    """
    made = {}
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]:
        try:
            made[name] = packed(layer)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        model.set_submodule(name, made[name])
    return made
