"""Rounding with a memory: what rounding one input channel of a weight costs is repaid by the channels after it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fp4dit.choice import Mixed
from fp4dit.formats import Format
from fp4dit.scaling import Scaling, from_parts, parts

Matrix = Float[Tensor, "k k"]
Order = Callable[[Matrix], Int[Tensor, "k"]]


def as_given(hessian: Matrix) -> Int[Tensor, "k"]:
    """The channels as the layer has them."""
    return torch.arange(len(hessian), device=hessian.device)


def largest_first(hessian: Matrix) -> Int[Tensor, "k"]:
    """The channels with most energy first, for they have most others left to repay them (GPTQ's act-order)."""
    return hessian.diagonal().argsort(descending=True, stable=True)


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "o k"],
    hessian: Matrix,
    scaling: Scaling,
    fmt: Format,
    block: int = 128,
    damping: float = 0.01,
    order: Order = as_given,
) -> Float[Tensor, "o k"]:
    """Hard weights W' on the grid with a small (W - W') H (W - W')^T: GPTQ (arXiv:2210.17323) on any grid.

    `hessian` is the sum of x x^T over the layer's inputs; its size does not matter, nor do inputs that are always 0,
    whose weights are rounded to nearest. The scales are fixed ones ("static groups"), so that any `order` keeps a
    channel in its group. `damping` is a share of the mean diagonal, which is added to the diagonal. `block` changes
    the speed and nothing else.

    Instead of updating all later channels after each one, with a row of H^-1's Cholesky factor, a channel collects
    its updates when its turn comes, from a factor of H itself: the same numbers (arXiv:2507.18553) without an
    inverse, and without writing what is not yet needed.

    Raises:
        ValueError: if `hessian` is not finite, or no second moment.
    """
    rows, width = weight.shape
    cells = columnwise(scaling, fmt, rows, width)
    where = order(hessian)
    group = (where * len(cells) // width).tolist()
    repaid = repayments(hessian, where, damping)
    given = weight.T[where].to(hessian.dtype)  # [k, o], so that a channel is contiguous
    hard, error = torch.empty_like(given), torch.empty_like(given)
    for start in range(0, width, block):
        stop = min(start + block, width)
        tile = torch.addmm(given[start:stop], repaid[start:stop, :start], error[:start])
        for j in range(start, stop):
            wanted = torch.addmv(tile[j - start], error[start:j].T, repaid[j, start:j])
            column, values = cells[group[j]]
            hard[j] = column.from_grid(values.nearest(column.to_grid(wanted[:, None])))[:, 0]
            torch.sub(given[j], hard[j], out=error[j])
    result = torch.empty_like(weight)
    result[:, where] = hard.T.to(weight.dtype)
    return result


def columnwise(scaling: Scaling, fmt: Format, rows: int, width: int) -> list[tuple[Scaling, Format]]:
    """Scaling and format of one column of each group of columns: per row, from what is per block, in row order."""
    found = parts(scaling) | ({"index": fmt.index} if isinstance(fmt, Mixed) else {})
    spread = {name: spread_out(part, rows, width) for name, part in found.items()}
    groups = max(len(part) for part in spread.values())
    cells = []
    for i in range(groups):
        column = {name: part[i * len(part) // groups, :, None] for name, part in spread.items()}
        values = replace(fmt, index=column.pop("index")) if isinstance(fmt, Mixed) else fmt
        cells.append((from_parts(column), values))
    return cells


def spread_out(part: Shaped[Tensor, "blocks place"], rows: int, width: int) -> Shaped[Tensor, "groups o"]:
    """Numbers per block, be it a piece of a row, a row, several or all; or per place in a block, for all blocks."""
    if part.shape[1] > 1:
        return part.expand(rows * width // part.shape[1], -1).reshape(rows, width).T.contiguous()
    if len(part) < rows:
        part = part.repeat_interleave(rows // len(part), 0)
    return part.view(rows, -1).T.contiguous()


def repayments(hessian: Matrix, order: Int[Tensor, "k"], damping: float) -> Matrix:
    """Row j says how the error of each earlier channel changes channel j: strictly lower triangular, in `order`.

    With H = R R^T, R upper triangular, (d R)_j holds d_i for i <= j alone, and is 0 for d_j = -sum_i d_i R_ij / R_jj.
    """
    if not hessian.isfinite().all():
        raise ValueError(
            "the inputs of a layer hold NaN or infinity, or overflow when squared: look at what the calibration calls "
            "hold, or round this layer to nearest"
        )
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    backwards = order.flip(0)
    matrix = hessian[backwards[:, None], backwards]  # its lower factor, read backwards, is the upper one
    matrix.diagonal().add_(torch.where(live, 0, mean)[backwards])
    for more, dtype in ((0, hessian.dtype), (0, torch.float64), (0.01, torch.float64), (0.1, torch.float64)):
        damped = matrix.to(dtype, copy=True)
        damped.diagonal().add_((damping + more) * mean)
        factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not failed:
            factor = factor.flip(0, 1).to(hessian.dtype)
            return factor.div_(factor.diagonal()[:, None].clone()).tril_(-1)
    raise ValueError(
        f"a matrix that even a damping of {damping + 0.1:g} leaves indefinite is no sum of x x^T: give gptq the "
        "symmetric second moment of the layer's inputs"
    )
