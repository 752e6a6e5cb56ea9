"""The smoothing and the low-rank branch of Nunchaku's layers.

Readers compute Q(x / smooth) W^T + x proj_down proj_up^T: the branch reads inputs that are not
smoothed. Where the branch follows the smoothing here, its factor is divided by the smoothing, which
is exact only if that consists of powers of two.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.packed.targets.base import FittedTransform, StoredLayer
from fp4dit.packed.targets.nunchaku_layout import (
    LOW_RANK_TILE,
    down_tiling,
    scale_tiling,
    up_tiling,
)
from fp4dit.transforms.base import Transform
from fp4dit.transforms.low_rank import LowRankBF16, LowRankBranch
from fp4dit.transforms.smoothing import ChannelDivision, PowerOfTwoSmoothingSearch
from fp4dit.utils.errors import UserError

FITS = "use transform=smooth_low_rank_bf16 and export_format.dtype=bfloat16"


def encode_transforms(
    transforms: Sequence[Transform], shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the smoothing and the branch of a layer of o rows and k columns.

    Raises:
        UserError: if it has other transforms, or numbers that are not of `dtype`.
    """
    rows, k = shape
    smooth = torch.ones(k, dtype=torch.float64)
    down, up = torch.zeros(0, k, dtype=torch.float64), torch.zeros(rows, 0, dtype=torch.float64)
    for transform in transforms:
        if isinstance(transform, ChannelDivision):
            smooth = smooth * transform.divisor.cpu().double()
        elif isinstance(transform, LowRankBranch):
            down = torch.cat([down, unsmooth(transform.down.cpu().double(), smooth, dtype)])
            up = torch.cat([up, transform.up.cpu().double()], 1)
        else:
            raise UserError(
                f"it transforms its input ({type(transform).__name__}), and not only by smoothing "
                "and a low-rank branch: use transform=smooth_low_rank_bf16 or none, and a weight "
                "whose layers have no transforms of their own, such as weight=int4_g64"
            )
    if len(down) > rank:
        fits = -(-len(down) // LOW_RANK_TILE) * LOW_RANK_TILE
        raise UserError(
            f"its branch has rank {len(down)}, and that of the target is {rank}: use "
            f"transform=smooth_low_rank_bf16, or export_format.target.rank={fits}"
        )
    missing = rank - len(down)
    down = torch.cat([down, down.new_zeros(missing, k)])
    up = torch.cat([up, up.new_zeros(rows, missing)], 1)
    return {
        "smooth_factor": scale_tiling(1).arrange(cast_exactly(smooth, dtype, "smoothing")),
        "proj_down": down_tiling(k).arrange(cast_exactly(down, dtype, "branch")).view(k, rank),
        "proj_up": up_tiling(rank).arrange(cast_exactly(up, dtype, "branch")).view(rows, rank),
    }


def unsmooth(
    down: Float[Tensor, "r k"], smooth: Float[Tensor, "k"], dtype: torch.dtype
) -> Float[Tensor, "r k"]:
    """Return the factor of a branch that reads inputs before they are divided by `smooth`.

    Raises:
        UserError: if a quotient is not a number of `dtype`.
    """
    quotient = (down / smooth).to(dtype).double()
    if not (quotient * smooth).equal(down):  # the products are exact
        raise UserError(
            "its branch reads smoothed inputs, and readers' branches do not: divided by the "
            f"smoothing factors, the branch has numbers that are not of {dtype}: {FITS}"
        )
    return quotient


def cast_exactly(x: Float[Tensor, "..."], dtype: torch.dtype, what: str) -> Float[Tensor, "..."]:
    """Return a tensor in `dtype`.

    Raises:
        UserError: if a number changes.
    """
    cast = x.to(dtype)
    if not cast.double().equal(x):
        raise UserError(f"the numbers of its {what} are not of {dtype}: {FITS}")
    return cast


def restore_transforms(stored: StoredLayer) -> list[FittedTransform]:
    """Return the branch and the smoothing of a layer. What does nothing is left out.

    Raises:
        UserError: if a smoothing factor is not a number of fp16.
    """
    (rows, k), rank = stored.shape, stored.settings["rank"]
    smooth = scale_tiling(1).restore(stored.tensors["smooth_factor"])
    down = down_tiling(k).restore(stored.tensors["proj_down"]).view(rank, k)
    up = up_tiling(rank).restore(stored.tensors["proj_up"]).view(rows, rank)
    fitted: list[FittedTransform] = []
    used = down.any(1)
    if used.any():
        spec = LowRankBF16(int(used.sum()))
        branch = spec(rows, k)
        branch.down.copy_(cast_exactly(down[used].double(), branch.down.dtype, "branch"))
        branch.up.copy_(cast_exactly(up[:, used].double(), branch.up.dtype, "branch"))
        fitted.append((spec, branch))
    if (smooth != 1).any():
        spec = PowerOfTwoSmoothingSearch()
        division = spec(rows, k)
        division.divisor.copy_(cast_exactly(smooth.double(), torch.float16, "smoothing"))
        fitted.append((spec, division))
    return fitted
