"""Number formats: the finite sets of values that a quantized tensor may hold.

A `NumberFormat` is a range and a step that doubles with every binade above `min_exponent`. A float
has several binades; an integer has none above its minimum, hence one step. Nothing else differs, so
an INT-versus-FP ablation changes a constructor and never a code path. A `Codebook` is any other
ascending list of values.

To add a format, add it to `NAMED_FORMATS` below: its name is then a word of the configs, as in
`weight.format=nf4`, and its checkpoints can be exported if it has at most 8 bits. No entry is
needed for formats that `floating` and `integer` make, because configs spell their parameters: e2m5,
ue3m1, int3.

A new kind of format is a class with the members of `Format`, and a tag in `fp4dit/registry.py`.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.codebook import Codebook, compute_nf4_levels

# The integer type of each float type, and the mask of its exponent bits, which is the code of
# infinity. With all other bits cleared, a float is the power of two below it.
EXPONENT_MASKS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}


@runtime_checkable
class Format(Protocol):
    """A finite set of values.

    Attributes:
        name: Word for the format in configs.
        bits: Size of one code in bits.
        max: Largest value.
        min: Least value.

    Example:
        >>> fmt = floating(2, 1)
        >>> fmt.bracket(torch.tensor([2.4]))
        (tensor([2.]), tensor([3.]))
        >>> fmt.step(torch.tensor([2.4]))
        tensor([1.])
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> float: ...
    @property
    def max(self) -> float: ...
    @property
    def min(self) -> float: ...
    def step(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the distance from each value to the next one further from zero; never 0."""
        ...

    def bracket(self, x: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """Return the two representable values around `x`, the one nearer to zero first."""
        ...

    def nearest(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Round to nearest, saturating at the ends of the range."""
        ...

    def values(self) -> Float[Tensor, "v"]:
        """Return every representable value, ascending, without -0."""
        ...


@dataclass(frozen=True)
class NumberFormat:
    """A floating-point or integer format: a range, and a step that doubles with every binade.

    `floating` and `integer` make one.

    Attributes:
        name: Word for the format in configs, such as "e2m1" or "uint4".
        bits: Size of one code in bits.
        mantissa: Number of mantissa bits. A binade has 2^mantissa steps.
        min_exponent: Exponent of the lowest binade. Below it, values are subnormal.
        max: Largest value.
        min: Least value: -max or 0.

    Raises:
        ValueError: if `bits` cannot tell the values apart, or there are no values.

    Example:
        >>> floating(2, 1).nearest(torch.tensor([0.6, 2.4, 100.0]))
        tensor([0.5000, 2.0000, 6.0000])
    """

    name: str
    bits: int
    mantissa: int
    min_exponent: int
    max: float
    min: float

    def __post_init__(self) -> None:
        fits = 1 <= self.bits <= 32 and 0 <= self.mantissa <= self.bits and 0 < self.max < math.inf
        binades = math.frexp(self.max)[1] - self.min_exponent + 1 if fits else 0
        if (
            not fits
            or not 1 <= binades <= 2 ** (self.bits - self.mantissa)
            or self.min not in (0, -self.max)
        ):
            raise ValueError(
                f"{self.name} is not a number format: {self.bits} bits do not hold its values"
            )

    @property
    def smallest(self) -> float:
        """Return the smallest positive value."""
        return 2.0 ** (self.min_exponent - self.mantissa)

    @property
    def is_integer(self) -> bool:
        """Whether the values are all whole numbers from `min` to `max`."""
        return self.smallest == 1 and self.max < 2.0 ** (self.min_exponent + 1)

    def step(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the distance from each value to the next one further from zero."""
        integers, mask = EXPONENT_MASKS[x.dtype]
        floor = (x.detach().view(integers) & mask).view(x.dtype)
        return floor.clamp_(min=max(2.0**self.min_exponent, torch.finfo(x.dtype).tiny)).mul_(
            2.0**-self.mantissa
        )

    def bracket(self, x: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """Return the two representable values around `x`, the one nearer to zero first."""
        # Adding 0 makes 0 of -0: an unsigned format has no outer neighbor of -0.
        x = x.clamp(self.min, self.max) + 0.0
        step = self.step(x)
        inner = (x.abs() / step).floor() * step
        outer = (inner + step).clamp(max=self.max)
        return torch.copysign(inner, x), torch.copysign(outer, x)

    def nearest(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Round to nearest, ties to even, saturating at the ends of the range."""
        x = x.clamp(self.min, self.max)
        # In place, because new memory costs more than the arithmetic.
        if self.is_integer:
            return x.round_()
        step = self.step(x)
        return x.div_(step).round_().mul_(step)

    def nearest_(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Round to nearest in place, in fewer passes than `nearest`. Zeros lose their sign.

        Adding and then subtracting a number whose own last bit is the step rounds to that step.

        Args:
            x: fp32 or fp64 values that exceed the range by a rounding error at most.
        """
        integers, mask = EXPONENT_MASKS[x.dtype]
        binade = (x.view(integers) & mask).view(x.dtype).clamp_(min=2.0**self.min_exponent)
        large = 1.5 * 2.0**-self.mantissa / torch.finfo(x.dtype).eps
        return x.add_(binade, alpha=large).sub_(binade, alpha=large)

    def values(self) -> Float[Tensor, "v"]:
        """Return every representable value, ascending, without -0."""
        magnitudes = [0.0]
        while magnitudes[-1] < self.max:
            magnitudes.append(magnitudes[-1] + self.step(torch.tensor(magnitudes[-1])).item())
        negative = [-m for m in reversed(magnitudes[1:])] if self.min < 0 else []
        return torch.tensor(negative + magnitudes)


def floating(exponent: int, mantissa: int, reserved: int = 0, signed: bool = True) -> NumberFormat:
    """Return the floating-point format ExMy, with subnormals.

    Its name is "e2m1", "ue3m1" (unsigned), "e4m3fn" (one reserved code), "e5m2ieee" (reserved codes
    as in IEEE 754), "fp16" or "bf16".

    Args:
        exponent: Number of exponent bits, 1 to 8.
        mantissa: Number of mantissa bits.
        reserved: How many of the largest codes of each sign encode infinity and NaN.
        signed: False for a format that starts at 0: for values that are never negative, or with an
            offset.

    Raises:
        ValueError: if `exponent` is 0, because such a format has no binades: use `integer`; or if
            it exceeds 8, because fp32 could not hold the values.
    """
    if not 1 <= exponent <= 8 or mantissa < 0:
        raise ValueError(
            f"E{exponent}M{mantissa} is not a floating-point format: it needs 1 to 8 exponent "
            "bits, and 0 or more mantissa bits. For evenly spaced values use "
            f"integer(bits={mantissa + 1 if mantissa > 0 else 4})."
        )
    bias = 2 ** (exponent - 1) - 1
    top, fraction = divmod(2 ** (exponent + mantissa) - 1 - reserved, 2**mantissa)
    largest = (1 + fraction / 2**mantissa) * 2.0 ** (top - bias)
    name = f"{'' if signed else 'u'}e{exponent}m{mantissa}{_reserved_suffix(mantissa, reserved)}"
    return NumberFormat(
        COMMON_NAMES.get(name, name),
        signed + exponent + mantissa,
        mantissa,
        1 - bias,
        largest,
        -largest if signed else 0.0,
    )


COMMON_NAMES = {"e5m10ieee": "fp16", "e8m7ieee": "bf16"}


def _reserved_suffix(mantissa: int, reserved: int) -> str:
    if reserved == 0:
        return ""
    if reserved == 1:
        return "fn"  # as in torch.float8_e4m3fn: NaN, but no infinity
    if reserved == 2**mantissa:
        return "ieee"
    return f"_reserved{reserved}"


def integer(bits: int, signed: bool = True) -> NumberFormat:
    """Return an integer format, called "int4" or "uint4".

    Signed, it holds -(2^(bits-1) - 1) to 2^(bits-1) - 1, symmetric. Unsigned, it holds 0 to
    2^bits - 1, to be used with a zero point.

    Raises:
        ValueError: if there are fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"an integer format needs at least 2 bits, not {bits}")
    digits = bits - signed
    largest = 2.0**digits - 1
    return NumberFormat(
        f"{'' if signed else 'u'}int{bits}",
        bits,
        digits,
        digits,
        largest,
        -largest if signed else 0.0,
    )


fp16 = floating(5, 10, reserved=2**10)

nf4 = Codebook("nf4", 4, compute_nf4_levels())

NAMED_FORMATS: dict[str, Format] = {
    "fp16": fp16,
    "bf16": floating(8, 7, reserved=2**7),
    "nf4": nf4,
}


def exponent_and_mantissa_bits(fmt: Format) -> tuple[int, int]:
    """Return a format's numbers of exponent and mantissa bits.

    Raises:
        ValueError: if it has none, as a codebook.
    """
    if not isinstance(fmt, NumberFormat):
        raise ValueError(
            f"{fmt.name} has no exponent and mantissa bits: choose a floating-point or integer "
            "format"
        )
    return fmt.bits - (fmt.min < 0) - fmt.mantissa, fmt.mantissa
