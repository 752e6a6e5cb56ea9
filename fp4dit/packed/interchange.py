"""What packed weights have in common with other libraries' block formats: exactly the same weight, or a refusal."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.errors import UserError
from fp4dit.formats import NumberFormat
from fp4dit.packed.layer import PackedConv, PackedLinear, empty
from fp4dit.packed.layout import Held, Layout, named
from fp4dit.packed.numbers import Kind, smallest
from fp4dit.quantizer import Granularity
from fp4dit.scaling import Scale


@runtime_checkable
class Counterpart(Protocol):
    """How another library keeps the weight of a linear layer: tensors, by what follows the layer's name."""

    @property
    def name(self) -> str: ...
    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The weight alone.

        Raises:
            UserError: if the other library would read another weight.
        """
        ...

    def inputs(self, activation: nn.Module) -> Any | None:
        """What makes the other library quantize an input to the bit as this does, if anything."""
        ...

    def read(self, kept: Mapping[str, Tensor]) -> tuple[Layout, Held]:
        """Raises UserError if it is not what `write` would have made of a weight."""
        ...


def block_scales(layer: PackedLinear, fmt: NumberFormat, width: int) -> Float[Tensor, "n"]:
    """In fp32, of a layer that is nothing but codes of this format with a scale for each `width` values of a row.

    Raises:
        UserError: if it is more, or anything else.
    """
    if (reason := next(differences(layer, fmt, width), None)) is not None:
        raise UserError(reason)
    scaling = layer.scaling
    assert isinstance(scaling, Scale)
    return scaling.scale.flatten()


def differences(layer: PackedLinear, fmt: NumberFormat, width: int) -> Iterator[str]:
    own = layer.layout
    block = own.granularity.width(torch.Size([layer.out_features, layer.in_features]))
    if isinstance(layer, PackedConv):
        yield "it is a convolution, and only linear layers can be"
    if layer.chain:
        yield f"it transforms its input ({', '.join(type(transform).__name__ for transform in layer.chain)})"
    if list(own.formats) != [fmt]:
        yield f"its values are {' or '.join(found.name for found in own.formats)}, and not {fmt.name}"
    if set(own.scaling) != {"scale"}:
        yield f"its blocks have {' and '.join(own.scaling)}, and not a scale alone"
    if block != width:
        yield f"{block} values share a scale, and not {width}"


def laid_out(
    codes: UInt8[Tensor, "o b"], fmt: NumberFormat, width: int, scales: Float[Tensor, "rows blocks"]
) -> tuple[Layout, Held]:
    """Such a layer's weight, its scales in the fewest bytes that hold them exactly.

    Raises:
        UserError: if there is not a scale for each block, or one is no number.
    """
    if scales.shape != (len(codes), codes.shape[1] * 8 // (fmt.bits * width)):
        raise UserError(f"there are scales {list(scales.shape)} for codes {list(codes.shape)} in blocks of {width}")
    if not scales.isfinite().all():
        raise UserError("a scale is NaN or infinite: the weight is damaged")
    flat = scales.flatten().cpu()
    numbers, parts = smallest(flat, one_kind(len(flat)), 1)
    layout = Layout((fmt,), Granularity("group", width), {"scale": numbers})
    return layout, {"codes": codes, **{named("scale", part): value for part, value in parts.items()}}


def one_kind(n: int) -> Kind:
    return torch.zeros(1, dtype=torch.uint8).expand(n)


def filled(source: nn.Linear, layout: Layout, held: Held, device: torch.device | str) -> PackedLinear:
    """The packed layer in place of this one, whose own weight is not read.

    Raises:
        UserError: if this is no weight for it.
    """
    made = empty(source, layout, (), device)
    for name, value in held.items():
        if value.shape != getattr(made, name).shape:
            raise UserError(f"a weight of other shape than {[source.out_features, source.in_features]}")
        getattr(made, name).copy_(value)
    return made
