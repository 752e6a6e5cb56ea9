"""A weight as codes and scalings: how they lie, and the way there and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.ams import SharedMantissa
from fp4dit.choice import Choice
from fp4dit.errors import UserError
from fp4dit.formats import Format
from fp4dit.grid import Grid
from fp4dit.packed import bits
from fp4dit.packed.codes import code_bits, encode, levels, pairs
from fp4dit.packed.numbers import Numbers, smallest
from fp4dit.quantizer import Granularity
from fp4dit.scaling import Blocks, Scale, Scaling, from_parts, parts

Rows = Float[Tensor, "o k"]
PART = 2**18  # values that are unpacked at a time: in fp32 what a cache of a core holds
Held = Mapping[str, UInt8[Tensor, "..."]]


@dataclass(frozen=True)
class Layout:
    """What `held`, the bytes of a weight of o rows of k values, mean.

    `codes` has a row for each row of the weight. Where values share their last bit, that is left out of the codes and
    lies in `shared`, one bit for each group. Where each block has one of several `formats`, `choice` says which. The
    numbers of a scaling lie under their names, in the order of the blocks, as `scaling` says of each.
    """

    formats: Sequence[Format]
    granularity: Granularity
    scaling: Mapping[str, Numbers]

    @property
    def share(self) -> int:
        """How many values share their last bit."""
        first = self.formats[0]
        return first.share if isinstance(first, SharedMantissa) else 1

    @property
    def code(self) -> int:
        """Bits of one code as it lies."""
        return code_bits(self.formats[0]) - (self.share > 1)

    @property
    def choice(self) -> int:
        """Bits that tell the formats apart."""
        return (len(self.formats) - 1).bit_length()

    def groups(self, width: int) -> int:
        """Of values with a shared bit, in a block."""
        return -(-width // self.share)

    def sizes(self, o: int, k: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all that is held."""
        width = self.granularity.width(torch.Size([o, k]))
        blocks = o * k // width
        found: dict[str, tuple[int, ...]] = {"codes": (o, bits.size(k, self.code))}
        if self.share > 1:
            found["shared"] = (bits.size(blocks * self.groups(width), 1),)
        if self.choice:
            found["choice"] = (bits.size(blocks, self.choice),)
        for name, numbers in self.scaling.items():
            found |= {named(name, part): (size,) for part, size in numbers.sizes(blocks).items()}
        return found

    def table(self) -> Tensor:
        """What is looked up to read a weight: the values of codes or, where a byte is two codes, those of all bytes."""
        return pairs(self.formats[0]) if self.bytewise else torch.cat([levels(fmt) for fmt in self.formats])

    @property
    def bytewise(self) -> bool:
        return self.code == 4 and self.share == 1 and not self.choice

    def weight(self, held: Held, k: int, table: Tensor, dtype: torch.dtype = torch.float32) -> Rows:
        """What fp32 makes of codes and scalings, cast: on a CPU some rows at a time, before they leave the cache."""
        codes, width = held["codes"], self.granularity.width(torch.Size([len(held["codes"]), k]))
        scaling, step = self.scales(held, self.kind(held, len(codes) * k // width)), max(1, PART // k)
        if dtype == torch.float32 or not (codes.is_cpu and self.bytewise and k % width == 0):
            return scaled(self.grid(held, k, table), scaling, width).to(dtype)
        made = torch.empty(len(codes), k, dtype=dtype)
        pieces = split(scaling, step * k // width)
        for rows, own, piece in zip(made.split(step), codes.split(step), pieces, strict=True):
            rows.copy_(scaled(self.grid({"codes": own}, k, table), piece, width))
        return made

    def grid(self, held: Held, k: int, table: Tensor) -> Rows:
        """The values of the codes."""
        codes = held["codes"]
        if self.bytewise:
            found = table.index_select(0, codes.flatten().int()).view(torch.float32)
            return found.view(len(codes), -1)[:, :k]
        whole = self.whole(bits.unpack(codes, self.code, k), held, self.granularity.width(torch.Size([len(codes), k])))
        index = whole.int()
        if self.choice:
            index += self.kind(held, len(index)).int()[:, None] << code_bits(self.formats[0])
        return table.index_select(0, index.flatten()).view(len(codes), k)

    def kind(self, held: Held, blocks: int) -> UInt8[Tensor, "blocks"]:
        """Which of the formats each block has."""
        if self.choice:
            return bits.unpack(held["choice"], self.choice, blocks)
        return held["codes"].new_zeros(1).expand(blocks)

    def whole(self, codes: UInt8[Tensor, "o k"], held: Held, width: int) -> UInt8[Tensor, "blocks width"]:
        """The codes with the bits that they share."""
        blocks = codes.reshape(-1, width)
        if self.share == 1:
            return blocks
        groups = self.groups(width)
        shared = bits.unpack(held["shared"], 1, len(blocks) * groups).view(-1, groups)
        return blocks << 1 | shared.repeat_interleave(self.share, 1)[:, :width]

    def scales(self, held: Held, kind: UInt8[Tensor, "blocks"]) -> Scaling:
        found = {}
        for name, numbers in self.scaling.items():
            own = {part: held[named(name, part)] for part in numbers.sizes(len(kind))}
            found[name] = numbers.decode(own, kind).view(-1, 1)
        return from_parts(found)


def scaled(grid: Rows, scaling: Scaling, width: int) -> Rows:
    """Of the values of codes, the weight; they may be overwritten, for new memory costs more than the arithmetic."""
    blocks = grid.reshape(-1, width)
    made = blocks.mul_(scaling.scale) if isinstance(scaling, Scale) else scaling.from_grid(blocks)
    return made.view(grid.shape)


def split(scaling: Scaling, blocks: int) -> list[Scaling]:
    """Scalings of so many blocks each."""
    columns = {name: value.split(blocks) for name, value in parts(scaling).items()}
    return [from_parts(dict(zip(columns, own, strict=True))) for own in zip(*columns.values(), strict=True)]


def named(name: str, part: str) -> str:
    return f"{name}_{part}" if part else name


def pack(weight: Rows, grid: Grid) -> tuple[Layout, dict[str, UInt8[Tensor, "..."]]]:
    """A weight that lies on its grid.

    Raises:
        UserError: if it does not, or there is no way to keep its format or scales.
    """
    blocks, scaling = grid.quantizer.granularity.split(weight).float(), grid.scaling
    assert scaling is not None, "round the weight first"
    formats, kind = chosen(grid, len(blocks))
    held = {}
    numbers = {name: smallest(column(value, len(blocks)), kind, len(formats)) for name, value in parts(scaling).items()}
    layout = Layout(formats, grid.quantizer.granularity, {name: way for name, (way, _) in numbers.items()})
    codes = encoded(grid.format.nearest(scaling.to_grid(blocks)).cpu(), formats, kind)
    if layout.share > 1:
        held["shared"] = bits.pack((codes & 1)[:, :: layout.share].flatten(), 1)
        codes >>= 1
    held["codes"] = bits.pack(codes.view(weight.shape), layout.code)
    if layout.choice:
        held["choice"] = bits.pack(kind, layout.choice)
    for name, (_, found) in numbers.items():
        held |= {named(name, part): value for part, value in found.items()}
    if not layout.weight(held, weight.shape[1], layout.table()).to(weight.dtype).equal(weight.cpu()):
        raise UserError("the weight does not lie on its grid: it was changed after it was rounded, or never rounded")
    return layout, held


def column(value: Tensor, blocks: int) -> Float[Tensor, "blocks"]:
    if value.shape != (blocks, 1):
        raise UserError("a weight that is scaled by input channel is not packed: give it one scale per row or group")
    return value.flatten().float().cpu()


def chosen(grid: Grid, blocks: int) -> tuple[tuple[Format, ...], UInt8[Tensor, "blocks"]]:
    """The formats that blocks may have, and which each has."""
    given = grid.quantizer.format
    index = grid.held()["choice"].cpu() if isinstance(given, Choice) else torch.zeros(1, 1, dtype=torch.uint8)
    if isinstance(given, Choice) and len(index) > 1:
        return tuple(given.formats), index[:, 0]
    return (grid.format,), torch.zeros(1, dtype=torch.uint8).expand(blocks)


def encoded(x: Blocks, formats: Sequence[Format], kind: UInt8[Tensor, "blocks"]) -> UInt8[Tensor, "blocks block"]:
    """Each block in the format that is chosen for it."""
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for i, fmt in enumerate(formats):
        codes[kind == i] = encode(x[kind == i], levels(fmt))
    return codes
