"""The 4-bit formats of weights that are compared, each as a quantizer."""

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale, floor_exponent
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import Granularity, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax

# Formats with one fp16 scale for each block of any size, by their words in configs.
ELEMENTS = {
    "int4": (integer(4), AbsMax(fp16)),
    "uint4": (integer(4, signed=False), MinMax(fp16)),
    "e2m1": (floating(2, 1), AbsMax(fp16)),
    "e3m0": (floating(3, 0), AbsMax(fp16)),
    "nf4": (nf4, AbsMax(fp16)),
}

# Formats with 8-bit scales of short blocks, whose size is part of them. IF4 (arXiv:2603.28765) is
# INT4 or FP4 for each block, with the choice in the sign of its scale, at 4.5 bits like NVFP4.
BLOCK_FORMATS = {
    "nvfp4": Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale()),
    "nvint4": Quantizer(integer(4), PerGroup(16), NVFP4Scale()),
    "if4": Quantizer(
        FormatSelection([floating(2, 1), integer(4)], LeastError(), per="block"),
        PerGroup(16),
        NVFP4Scale(),
    ),
    "mxfp4": Quantizer(floating(2, 1), PerGroup(32), E8M0Scale()),
    "mxfp4 floor": Quantizer(floating(2, 1), PerGroup(32), E8M0Scale(round=floor_exponent)),
}

# What these are called in sentences.
TITLES = {
    "int4": "INT4, symmetric",
    "uint4": "INT4 with a zero point",
    "e2m1": "E2M1",
    "e3m0": "E3M0",
    "nf4": "NF4",
    "nvfp4": "NVFP4",
    "nvint4": "INT4 with NVFP4's scales",
    "if4": "IF4",
    "mxfp4": "MXFP4, `even`",
    "mxfp4 floor": "MXFP4, `floor` (OCP)",
}


def make_element_quantizers(granularity: Granularity) -> dict[str, Quantizer]:
    """Return a quantizer of each of `ELEMENTS` with the given blocks.

    Example:
        >>> list(make_element_quantizers(PerGroup(128)))
        ['int4', 'uint4', 'e2m1', 'e3m0', 'nf4']
    """
    return {name: Quantizer(fmt, granularity, rule) for name, (fmt, rule) in ELEMENTS.items()}
