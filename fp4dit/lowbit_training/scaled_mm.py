"""MXFP4 products on hardware with block-scaled matrix multiplication."""

import logging
from functools import lru_cache

import torch
from jaxtyping import BFloat16, UInt8
from torch import Tensor
from torch.nn import functional as F

from fp4dit.lowbit_training.operand_quant import E2M1, PackedMXFP4

log = logging.getLogger(__name__)

SCALE_GROUP = 32  # The number of MXFP4 values that share a scale.

MIN_CAPABILITY = (10, 0)  # compute capability of Blackwell GPUs

ROW_ALIGNMENT = 16  # The rows of the second operand are a multiple of this.


def has_aligned_rows(right: PackedMXFP4) -> bool:
    """Return whether a second operand has a supported number of rows."""
    return len(right.codes) % ROW_ALIGNMENT == 0


def matmul_scaled(left: PackedMXFP4, right: PackedMXFP4) -> BFloat16[Tensor, "m o"]:
    """Return left right^T."""
    recipe, order = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    a, b = left.codes.view(torch.float4_e2m1fn_x2), right.codes.view(torch.float4_e2m1fn_x2)
    a_scale = swizzle_scales(left.scales).view(torch.float8_e8m0fnu)
    b_scale = swizzle_scales(right.scales).view(torch.float8_e8m0fnu)
    return F.scaled_mm(
        a, b.T, a_scale, recipe, b_scale, recipe, order, order, output_dtype=torch.bfloat16
    )


def swizzle_scales(scales: UInt8[Tensor, "m blocks"]) -> UInt8[Tensor, "n"]:
    """Return scales in the layout of cuBLAS.

    They lie in tiles of 128 x 4, row of tiles by row of tiles. In a tile, the four quarters of 32
    rows lie side by side. Tiles are padded with zeros.
    """
    rows, columns = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    padded = F.pad(scales, (0, 4 * columns - scales.shape[1], 0, 128 * rows - scales.shape[0]))
    return padded.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4).flatten()


def unpack_values(packed: PackedMXFP4) -> BFloat16[Tensor, "m k"]:
    """Return the values of a packed operand."""
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], -1).flatten(1).int()
    magnitudes = E2M1.values()[E2M1.values() >= 0].to(codes.device)
    level = torch.where(codes >= 8, -1.0, 1.0) * magnitudes[codes & 7]
    scale = torch.ldexp(torch.ones_like(level[:, ::SCALE_GROUP]), packed.scales.int() - 127)
    return (level * scale.repeat_interleave(SCALE_GROUP, 1)).bfloat16()


@lru_cache
def supports_scaled_mm(device: torch.device) -> bool:
    """Return whether `device` multiplies MXFP4 operands, by trying it, and log the result once."""
    reason = explain_unsupported(device)
    if reason:
        log.info("MXFP4 products on %s are emulated in bf16: %s", device, reason)
    else:
        log.info("MXFP4 products on %s are block-scaled, by torch.nn.functional.scaled_mm", device)
    return not reason


def explain_unsupported(device: torch.device) -> str:
    """Return why `device` cannot multiply MXFP4 operands, or an empty text if it can."""
    if device.type != "cuda":
        return "only GPUs have block-scaled ones"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {'.'.join(map(str, capability))} has no block-scaled ones"
    generator = torch.Generator(device).manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(
            low, high, shape, generator=generator, device=device, dtype=torch.uint8
        )

    left = PackedMXFP4(draw(0, 256, 128, 64), draw(124, 131, 128, 4))
    right = PackedMXFP4(draw(0, 256, 128, 64), draw(124, 131, 128, 4))
    try:
        product = matmul_scaled(left, right)
    except Exception as error:  # The exception depends on how torch was built.
        return (str(error).splitlines() or [type(error).__name__])[0]
    expected = unpack_values(left).float() @ unpack_values(right).float().T
    if torch.allclose(product.float(), expected, rtol=1e-2, atol=1e-2):
        return ""
    return "torch's product is wrong"
