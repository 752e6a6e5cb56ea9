"""Linear and convolution layers with packed weights, for inference."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.qparams import QParams
from fp4dit.packed.encoding.layout import Layout
from fp4dit.packed.encoding.packing import pack_weight
from fp4dit.packed.nn.backends import packed_matmul
from fp4dit.packed.nn.base import PackedWeight
from fp4dit.quantization.convolution import ConvGeometry, ConvolutionMixin
from fp4dit.quantization.layers import QuantLayer, QuantLinearBase
from fp4dit.transforms.base import Transform
from fp4dit.utils.errors import UserError


class PackedLinear(QuantLinearBase, PackedWeight, nn.Linear):
    """Linear layer with a packed weight.

    It is a subclass of `nn.Linear`, so that adapters such as peft's LoRA find it.

    Args:
        layout: The layout of the packed buffers.
        shape: Out features and in features.
        dtype: The dtype that the weight is dequantized to.

    Example:
        >>> packed = pack_layer(quant_layer)  # after its weight is committed
        >>> packed(x).equal(quant_layer(x))
        True
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
        shapes = layout.buffer_shapes(*shape)
        self.buffer_names = tuple(shapes)
        for name, size in shapes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=device))
        self.register_buffer("table", layout.build_lookup_table(), persistent=False)
        self.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
        self.transforms = nn.ModuleList(transforms)
        self.input_fake_quant: nn.Module = nn.Identity()
        self.register_module("expanded", None)

    @property
    def reduction_size(self) -> int:
        return self.in_features

    @property
    def packed_buffers(self) -> dict[str, UInt8[Tensor, "..."]]:
        """The buffers of `layout`, by name."""
        return {name: getattr(self, name) for name in self.buffer_names}

    @property
    def weight(self) -> Float[Tensor, "o k"]:
        """A placeholder with the shape, dtype and device of the weight, full of NaN.

        It exists for code that only reads these attributes. It cannot be written: an adapter can be
        added to this layer, but not merged into it.
        """
        placeholder = torch.full((), torch.nan, dtype=self.dtype, device=self.codes.device)
        return placeholder.expand(self.out_features, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Apply `fn`, as `nn.Module.to` does. A cast changes `dtype`, and never the bytes."""
        probe = torch.empty(0, dtype=self.dtype, device=self.codes.device)
        self.dtype = fn(probe).dtype  # pyright: ignore[reportAttributeAccessIssue]
        return super()._apply(fn, recurse)

    @property
    def qparams(self) -> QParams:
        """The qparams of the weight in fp32, decoded from the buffers."""
        shape = torch.Size([self.out_features, self.in_features])
        blocks = shape.numel() // self.layout.granularity.width(shape)
        buffers = self.packed_buffers
        return self.layout.decode_qparams(buffers, self.layout.read_format_index(buffers, blocks))

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        """Return the weight in `dtype`."""
        return self.layout.dequantize(self.packed_buffers, self.in_features, self.table, dtype)

    def decode_values(self) -> Float[Tensor, "o k"]:
        """Return the weight over its scales, in fp32: values of the format."""
        values = self.layout.decode_codes(self.packed_buffers, self.in_features, self.table)
        return values.float()  # a cast of the model casts the table of 8-bit codes, too

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        transformed, bypass = self.apply_transforms(x)
        y = packed_matmul(self, transformed)
        return y if bypass is None else y + bypass

    def extra_repr(self) -> str:
        names = "|".join(fmt.name for fmt in self.layout.formats)
        return f"{super().extra_repr()}, {names}, {self.layout.granularity}"


class PackedConv(ConvolutionMixin, PackedLinear):
    """Convolution with a packed weight, computed as a matrix product over patches.

    Example:
        >>> packed = pack_layer(quant_conv)  # a `QuantConv` whose weight is committed
        >>> packed(images).shape  # 8 images of 64 x 64, in patches of 2 x 2
        torch.Size([8, 256, 32, 32])
    """

    geometry: ConvGeometry


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """Return the geometry of a torch convolution."""
    pairs = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return ConvGeometry(*map(tuple, pairs))  # pyright: ignore[reportArgumentType]


def make_empty_layer(
    source: nn.Linear | nn.Conv2d,
    layout: Layout,
    transforms: Sequence[Transform],
    device: torch.device | str = "meta",
) -> PackedLinear:
    """Make a packed layer in place of `source`, with uninitialized weight buffers."""
    shape = (source.weight.shape[0], source.weight[0].numel())
    layer_class = PackedConv if isinstance(source, nn.Conv2d) else PackedLinear
    layer = layer_class(layout, shape, source.bias, transforms, source.weight.dtype, device)
    if isinstance(layer, PackedConv) and isinstance(source, nn.Conv2d):
        layer.geometry = conv_geometry(source)
    return layer


def pack_layer(layer: QuantLayer) -> PackedLinear:
    """Pack a quantized layer whose weight is rounded.

    Raises:
        UserError: if the weight cannot be packed; see `pack_weight`.
    """
    layout, buffers = pack_weight(layer.weight_matrix, layer.weight_fake_quant)
    packed = make_empty_layer(layer.source, layout, layer.transform_chain, layer.weight.device)
    packed.input_fake_quant = layer.input_fake_quant
    for name, value in buffers.items():
        getattr(packed, name).copy_(value)
    return packed


def pack_layers_(model: nn.Module) -> dict[str, PackedLinear]:
    """Replace all quantized layers of a model by packed layers, in place.

    Returns:
        The packed layers, by name.

    Raises:
        UserError: if a weight cannot be packed. The message names the layer.
    """
    packed = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLayer):
            packed[name] = pack_layer_(model, name, layer)
    return packed


def pack_layer_(model: nn.Module, name: str, layer: QuantLayer) -> PackedLinear:
    """Replace one quantized layer of a model by a packed layer, in place, and return this.

    Raises:
        UserError: if the weight cannot be packed. The message names the layer.
    """
    try:
        packed = pack_layer(layer)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    model.set_submodule(name, packed)
    return packed
