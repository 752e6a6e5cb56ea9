"""MXFP4 products by hardware that has them: codes times codes, with the scales of their blocks."""

import logging
from functools import lru_cache

import torch
from jaxtyping import BFloat16, UInt8
from torch import Tensor
from torch.nn import functional as F

from fp4dit.training.projections import BLOCK, E2M1, Packed

log = logging.getLogger(__name__)
FIRST = (10, 0)  # compute capability, of Blackwell
ALIGNED = 16  # rows of the second operand, at least


def fits(right: Packed) -> bool:
    return len(right.codes) % ALIGNED == 0


def multiply(left: Packed, right: Packed) -> BFloat16[Tensor, "m o"]:
    """left right^T"""
    recipe, order = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    a, b = (side.codes.view(torch.float4_e2m1fn_x2) for side in (left, right))
    a_scale, b_scale = (swizzled(side.scales).view(torch.float8_e8m0fnu) for side in (left, right))
    return F.scaled_mm(a, b.T, a_scale, recipe, b_scale, recipe, order, order, output_dtype=torch.bfloat16)


def swizzled(scales: UInt8[Tensor, "m blocks"]) -> UInt8[Tensor, "n"]:
    """As cuBLAS reads them: tiles of 128 x 4, the tiles of a row one after another, and in each one the four quarters
    of 32 rows side by side. Tiles are filled up with zeros."""
    rows, columns = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    padded = F.pad(scales, (0, 4 * columns - scales.shape[1], 0, 128 * rows - scales.shape[0]))
    return padded.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4).flatten()


def values(packed: Packed) -> BFloat16[Tensor, "m k"]:
    """What is packed."""
    both = torch.stack([packed.codes & 15, packed.codes >> 4], -1).flatten(1).int()
    magnitudes = E2M1.values()[E2M1.values() >= 0].to(both.device)
    level = torch.where(both >= 8, -1.0, 1.0) * magnitudes[both & 7]
    scale = torch.ldexp(torch.ones_like(level[:, ::BLOCK]), packed.scales.int() - 127)
    return (level * scale.repeat_interleave(BLOCK, 1)).bfloat16()


@lru_cache
def offered(device: torch.device) -> bool:
    """Whether products are made so on this device, which is found out by making one; the log says it, once."""
    why = refusal(device)
    how = f"are emulated in bf16: {why}" if why else "are block-scaled, by torch.nn.functional.scaled_mm"
    log.info("MXFP4 products on %s %s", device, how)
    return not why


def refusal(device: torch.device) -> str:
    if device.type != "cuda":
        return "only GPUs have block-scaled ones"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST:
        return f"compute capability {'.'.join(map(str, capability))} has no block-scaled ones"
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda low, high, *shape: torch.randint(
        low, high, shape, generator=generator, device=device, dtype=torch.uint8
    )
    left, right = (Packed(draw(0, 256, 128, 64), draw(124, 131, 128, 4)) for _ in range(2))
    try:
        found = multiply(left, right)
    except Exception as error:  # whatever torch raises where it was built without
        return (str(error).splitlines() or [type(error).__name__])[0]
    wanted = values(left).float() @ values(right).float().T
    return "" if torch.allclose(found.float(), wanted, rtol=1e-2, atol=1e-2) else "torch's product is wrong"
