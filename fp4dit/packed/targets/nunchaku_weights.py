"""The weights of Nunchaku's layers: codes and scales, without smoothing and branches."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import integer
from fp4dit.numerics.qparams import Scale
from fp4dit.packed.encoding.codes import encode_values, list_code_values
from fp4dit.packed.encoding.qparams import list_common_factors
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.compressed_formats import E2M1
from fp4dit.packed.targets.grid import (
    PLAIN,
    GridWeight,
    make_integer_grid,
    matrix_shape,
    read_integers,
    require_scale,
    require_width,
)
from fp4dit.packed.targets.nunchaku_layout import (
    awq_tiling,
    micro_scale_tiling,
    pack_codes,
    scale_tiling,
    unpack_codes,
    weight_tiling,
)
from fp4dit.utils.errors import UserError

AWQ: dict[str, Any] = {"kind": "awq_w4a16", "precision": "int4", "group_size": 64}

SVDQ: dict[str, dict[str, Any]] = {
    "int4": {"kind": "svdq_w4a4", "precision": "int4", "group_size": 64},
    "nvfp4": {"kind": "svdq_w4a4", "precision": "nvfp4", "group_size": 16},
}

HALVES = (torch.bfloat16, torch.float16)


def list_shapes(
    stored: StoredLayer,
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Return the shape of each tensor that diffusers makes for a layer, and its dtypes."""
    (rows, k), settings = stored.shape, stored.settings
    groups = k // settings["group_size"]
    if settings["kind"] == AWQ["kind"]:
        return {
            "qweight": ((rows // 4, k // 2), (torch.int32,)),
            "wscales": ((groups, rows), HALVES),
            "wzeros": ((groups, rows), HALVES),
        }
    is_nvfp4, rank = settings["precision"] == "nvfp4", settings["rank"]
    shapes = {
        "qweight": ((rows, k // 2), (torch.int8,)),
        "wscales": ((groups, rows), (torch.float8_e4m3fn,) if is_nvfp4 else HALVES),
        "smooth_factor": ((k,), HALVES),
        "proj_down": ((k, rank), HALVES),
        "proj_up": ((rows, rank), HALVES),
    }
    if is_nvfp4:
        shapes |= {"wcscales": ((rows,), HALVES), "wtscale": ((1,), HALVES)}
    return shapes


def encode_svdq(grid: GridWeight, dtype: torch.dtype) -> tuple[str, dict[str, Tensor]]:
    """Return the precision of a weight, and its tensors.

    Raises:
        UserError: if it is neither symmetric INT4 in groups of 64 nor NVFP4.
    """
    if grid.fmt not in (integer(4), E2M1):
        raise UserError(
            f"its values are {grid.fmt.name}, and not int4 or e2m1: use weight.format=int4, or "
            f"{PLAIN}"
        )
    precision = "int4" if grid.fmt == integer(4) else "nvfp4"
    require_width(grid, (SVDQ[precision]["group_size"],))
    rows, k = grid.points.shape
    scale, points = grid.by_row(require_scale(grid)).cpu(), grid.points.cpu()
    groups = scale.shape[1]
    if precision == "int4":
        codes = points.int() & 15
        scales = {"wscales": scale_tiling(groups).arrange(scale.to(dtype)).view(groups, rows)}
    else:
        codes = encode_values(points, list_code_values(E2M1))
        scales = encode_two_levels(scale, dtype)
    packed = pack_codes(codes, weight_tiling(k), torch.int8, (rows, k // 2))
    return precision, {"qweight": packed, **scales}


def encode_two_levels(scale: Float[Tensor, "o n"], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return E4M3 scales and a factor, which is the product of two numbers of `dtype`.

    The first number is a power of two if fp16, which has no small ones, lacks the factor itself.

    Raises:
        UserError: if there is no such factor.
    """
    for factor in list_common_factors(scale.flatten().unique()):
        mantissa, exponent = torch.frexp(factor)
        power = torch.ldexp(torch.ones(()), exponent)
        for whole, part in ((factor, torch.ones(())), (power, mantissa)):
            if whole.to(dtype).float() != whole or part.to(dtype).float() != part:
                continue
            numbers = E4M3.nearest(scale / factor).to(torch.float8_e4m3fn)
            order = micro_scale_tiling(scale.shape[1])
            arranged = order.arrange(numbers.view(torch.uint8)).view(torch.float8_e4m3fn)
            return {
                "wscales": arranged.view(scale.shape[1], scale.shape[0]),
                "wcscales": part.to(dtype).repeat(len(scale)),
                "wtscale": whole.to(dtype).view(1),
            }
    raise UserError(
        f"its scales are not numbers of E4M3 times one number of {dtype}: use "
        "weight.scale.rule=nvfp4_power_of_two"
    )


def decode_svdq(stored: StoredLayer) -> GridWeight:
    """Return the weight of a layer of SVDQuant, without its branch."""
    tensors, (rows, k) = stored.tensors, matrix_shape(stored.shape)
    codes = unpack_codes(tensors["qweight"], weight_tiling(k), (rows, k))
    groups = k // stored.settings["group_size"]
    if stored.settings["precision"] == "int4":
        scale = scale_tiling(groups).restore(tensors["wscales"]).float().view(rows, groups)
        signed = (codes.int() ^ 8).float()  # plus 8
        return make_integer_grid(signed, scale, torch.full_like(scale, 8), 4)
    raw = micro_scale_tiling(groups).restore(tensors["wscales"].view(torch.uint8))
    scale = raw.view(torch.float8_e4m3fn).float().view(rows, groups)
    by_row = scale_tiling(1).restore(tensors["wcscales"]).float()[:, None]
    scale = scale * (tensors["wtscale"].float() * by_row)
    points = list_code_values(E2M1)[codes.int()]
    return GridWeight(E2M1, points, Scale(scale.reshape(-1, 1)), 16)


def encode_awq(grid: GridWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer of AWQ: unsigned codes, scales, and what is added.

    Raises:
        UserError: if it is not INT4 in groups of 64.
    """
    points, qparams = read_integers(grid, 4)
    require_width(grid, (64,))
    rows, k = points.shape
    added = grid.by_row(-qparams.zero * qparams.scale)
    return {
        "qweight": pack_codes(points.cpu(), awq_tiling(k), torch.int32, (rows // 4, k // 2)),
        "wscales": grid.by_row(qparams.scale).T.to(dtype).cpu().contiguous(),
        "wzeros": added.T.to(dtype).cpu().contiguous(),
    }


def read_awq(
    stored: StoredLayer,
) -> tuple[Float[Tensor, "o k"], Float[Tensor, "o n"], Float[Tensor, "o n"]]:
    """Return the codes of a layer of AWQ, its scales, and what is added to the products."""
    rows, k = matrix_shape(stored.shape)
    codes = unpack_codes(stored.tensors["qweight"], awq_tiling(k), (rows, k)).float()
    return codes, stored.tensors["wscales"].T.float(), stored.tensors["wzeros"].T.float()


def decode_awq(stored: StoredLayer) -> GridWeight:
    """Return the weight of a layer of AWQ.

    Raises:
        UserError: if its zero points are not whole numbers.
    """
    codes, scale, added = read_awq(stored)
    zero = (-added / scale).nan_to_num().round()
    if not (-zero * scale).equal(added):
        raise UserError("its zero points are not whole numbers, and only these can be packed")
    return make_integer_grid(codes, scale, zero, 4)


def dequantize_awq(stored: StoredLayer) -> Float[Tensor, "o k"]:
    """Return the weight of a layer of AWQ as readers compute it, in fp32."""
    codes, scale, added = read_awq(stored)
    width = codes.shape[1] // scale.shape[1]
    return codes * scale.repeat_interleave(width, 1) + added.repeat_interleave(width, 1)
