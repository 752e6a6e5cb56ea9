"""Quantization of operands on a GPU: rotation, scales, rounding and mask in one Triton kernel."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from fp4dit.lowbit_training import triton_kernels
from fp4dit.lowbit_training.operand_quant import (
    E2M1,
    ROTATION_SIZE,
    Alpha,
    BlockOperandQuantizer,
    Matrix,
    OperandQuantizer,
    PackedMXFP4,
    QuantizedOperand,
    rotation_matrix,
)
from fp4dit.lowbit_training.rng import BlockSigns
from fp4dit.numerics.block_scales import E8M0Scale, ExponentRule, max_magnitude
from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.quantizer import PerGroup
from fp4dit.numerics.scale_rules import RootMeanSquares

ROWS = 64  # Rows of a program: with 32 columns they fit into the registers of four warps.


@dataclass(frozen=True)
class KernelConfig:
    """Constants of the kernel for an operand quantizer.

    Attributes:
        quantizer: Operand quantizer.
        format: Number format.
        offset: Exponent of the scale minus that of the reach. See `triton_kernels.scale_exponent`.
        threshold: Mantissa of the reach, in (1, 2], from which on the exponent is one more.
        count: Root mean squares that the reach is, or 0 for the largest magnitude.
    """

    quantizer: BlockOperandQuantizer
    format: NumberFormat
    offset: int
    threshold: float
    count: float


@lru_cache
def make_kernel_config(quantizer: OperandQuantizer) -> KernelConfig | None:
    """Return the constants of the kernel, or None if it does not support this quantizer."""
    if not isinstance(quantizer, BlockOperandQuantizer) or quantizer.amax is not None:
        return None
    if quantizer.quantizer.granularity != PerGroup(ROTATION_SIZE):
        return None
    fmt, rule = quantizer.quantizer.format, quantizer.quantizer.scale
    if not isinstance(fmt, NumberFormat) or fmt.bits > 8 or fmt.min != -fmt.max:
        return None  # bf16 holds formats of up to 8 bits.
    if not isinstance(rule, E8M0Scale) or rule.factor != 1 or tuple(rule.shifts) != (0,):
        return None
    if rule.reach is not max_magnitude and not isinstance(rule.reach, RootMeanSquares):
        return None
    count = rule.reach.count if isinstance(rule.reach, RootMeanSquares) else 0.0
    offset, threshold = find_exponent_threshold(rule.round, fmt)
    return KernelConfig(quantizer, fmt, offset, threshold, float(count))


def find_exponent_threshold(rule: ExponentRule, fmt: NumberFormat) -> tuple[int, float]:
    """Return a rule's exponent for a reach of 1, and the threshold in (1, 2] for one more.

    The exponent increases once per binade, and by 1 when the reach doubles. Bisection over all
    fp32 mantissas therefore finds the threshold.
    """

    def exponent_of(reach: float) -> int:
        return int(rule(torch.tensor([[reach]]), fmt))

    first, low, high = exponent_of(1.0), 0, 1 << 23
    while high - low > 1:
        middle = (low + high) // 2
        if exponent_of(1 + middle / (1 << 23)) == first:
            low = middle
        else:
            high = middle
    return first, 1 + high / (1 << 23)


def quantize_operand_on_gpu(
    x: Matrix,
    config: KernelConfig,
    signs: BlockSigns | None = None,
    alpha: Alpha = 1.0,
    generator: torch.Generator | None = None,
    packed: bool = False,
) -> QuantizedOperand:
    """Return the operand, rotated and quantized by the Triton kernel.

    Args:
        x: Operand, in any memory layout: a transposed one is read as it is.
        config: Constants of the kernel.
        signs: Signs of the channels of each block before the rotation.
        alpha: Factor of x.
        generator: Generator of stochastic rounding, on the device of x.
        packed: Return E2M1 values as codes and scales too.
    """
    (m, k), quantizer, fmt = x.shape, config.quantizer, config.format
    width = k + -k % ROTATION_SIZE
    assert not packed or fmt == E2M1, "only E2M1 has these codes"

    def allocate(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(m, columns, dtype=dtype, device=x.device)

    values = allocate(width, torch.bfloat16)
    unclipped = allocate(width, torch.bool) if quantizer.record_clipped else None
    codes = scales = packed_values = seed = None
    if packed:
        codes = allocate(width // 2, torch.uint8)
        scales = allocate(width // ROTATION_SIZE, torch.uint8)
        packed_values = PackedMXFP4(codes, scales)
    if quantizer.stochastic:
        seed = torch.randint(2**31 - 1, (1,), generator=generator, device=x.device)
    rotation = rotation_matrix(x.device, torch.float32, signs, alpha).contiguous()
    with torch.cuda.device_of(x):
        triton_kernels.quantize_operand_kernel[triton.cdiv(m, ROWS), width // ROTATION_SIZE](
            x, rotation, seed, values, unclipped, codes, scales, m, k, x.stride(0), x.stride(1),
            width, config.offset, config.threshold, config.count,
            fmt.mantissa, 2.0**fmt.min_exponent, fmt.max, float(quantizer.scale_multiplier),
            ROWS, ROTATION_SIZE,
        )  # fmt: skip
    alpha = quantizer.magnitude_alignment * quantizer.scale_multiplier
    return QuantizedOperand(values, alpha, unclipped, packed_values)
