"""The columns of a weight, rounded with GPTQ (arXiv:2210.17323) for arbitrary grids.

GPTQ rounds the columns of a weight one by one, and changes the remaining columns to compensate for
the error of each, so that (W - W') H (W - W')^T stays small. H is the sum of x x^T over the layer's
inputs.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fp4dit.numerics.format_selection import FormatSelection, PerBlockFormat
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import QParams, as_tensors, from_tensors
from fp4dit.numerics.quantizer import Quantizer
from fp4dit.numerics.scale_rules import fix_tensor_scale

Hessian = Float[Tensor, "k k"]

ColumnOrder = Callable[[Hessian], Int[Tensor, "k"]]


def natural_order(hessian: Hessian) -> Int[Tensor, "k"]:
    """Return the input channels in the order of the layer."""
    return torch.arange(len(hessian), device=hessian.device)


def activation_order(hessian: Hessian) -> Int[Tensor, "k"]:
    """Return the input channels with the largest activations first (GPTQ's act-order).

    The errors of the first columns can be compensated best, because most columns still follow.
    """
    return hessian.diagonal().argsort(descending=True, stable=True)


@torch.no_grad()
def quantize_with_gptq(
    weight: Float[Tensor, "o k"],
    hessian: Hessian,
    qparams: QParams,
    fmt: Format,
    block_size: int = 128,
    damping: float = 0.01,
    order: ColumnOrder = natural_order,
) -> Float[Tensor, "o k"]:
    """Return hard weights W' on the grid with a small error (W - W') H (W - W')^T.

    The original algorithm updates all later columns after it rounds a column, with a row of the
    Cholesky factor of H^-1. Here the updates of a column are summed only before it is rounded, with
    a row of a factor of H itself. The result is the same (arXiv:2507.18553), but H is not inverted,
    and the weight is written less often.

    Args:
        weight: Weight W in full precision.
        hessian: Sum of x x^T over the inputs, up to a factor. The weights of an input channel that
            is always 0 are rounded to nearest.
        qparams: Qparams of the weight. They stay fixed ("static groups"), so that a column keeps
            the scales of its group in every order.
        fmt: Number format.
        block_size: Columns that are updated together. This only changes the speed.
        damping: Share of the mean diagonal of H that is added to the diagonal.
        order: Order of the columns.

    Raises:
        ValueError: If `hessian` is not finite, or not a sum of x x^T.
    """
    rows, width = weight.shape
    groups = qparams_per_column_group(qparams, fmt, rows, width)
    columns = order(hessian)
    group_index = (columns * len(groups) // width).tolist()
    feedback = error_feedback_matrix(hessian, columns, damping)
    original = weight.T[columns].to(hessian.dtype)  # [k, o], so that a column is contiguous
    hard, error = torch.empty_like(original), torch.empty_like(original)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        tile = torch.addmm(original[start:stop], feedback[start:stop, :start], error[:start])
        column_groups = [groups[i] for i in group_index[start:stop]]
        round_columns(slice(start, stop), tile, original, feedback, column_groups, hard, error)
    result = torch.empty_like(weight)
    result[:, columns] = hard.T.to(weight.dtype)
    return result


def round_columns(
    tile_columns: slice,
    tile: Float[Tensor, "tile o"],
    original: Float[Tensor, "k o"],
    feedback: Hessian,
    groups: Sequence[tuple[QParams, Format]],
    hard: Float[Tensor, "k o"],
    error: Float[Tensor, "k o"],
) -> None:
    """Round neighboring columns one after another, and write `hard` and `error` in place.

    Args:
        tile_columns: The numbers of the columns.
        tile: The columns with the feedback of the error of all columns before them.
        original: All columns in full precision.
        feedback: The matrix of `error_feedback_matrix`.
        groups: The qparams and the format of each of the columns.
        hard: The rounded columns.
        error: The differences of the original and the rounded columns.
    """
    start = tile_columns.start
    for j in range(start, tile_columns.stop):
        target = torch.addmv(tile[j - start], error[start:j].T, feedback[j, start:j])
        qparams, fmt = groups[j - start]
        grid = qparams.to_grid(target[:, None])
        hard[j] = qparams.from_grid(fmt.nearest(grid))[:, 0]
        torch.sub(original[j], hard[j], out=error[j])


@torch.no_grad()
def quantize_with_rescaled_groups(
    weight: Float[Tensor, "o k"], hessian: Hessian, quantizer: Quantizer, damping: float = 0.01
) -> tuple[Float[Tensor, "o k"], QParams]:
    """Return the hard weights and the qparams of GPTQ that measures scales as it goes.

    The scales of a group are chosen when its first column is reached, for the columns of the group
    with the errors of all earlier columns compensated in them, as in the code of GPTQ
    (arXiv:2210.17323) and of Q-DiT (arXiv:2406.17343).

    Args:
        weight: Weight W in full precision.
        hessian: Sum of x x^T over the inputs, up to a factor.
        quantizer: Quantizer of the weight, with one format.
        damping: Share of the mean diagonal of H that is added to the diagonal.

    Raises:
        ValueError: If `hessian` is not finite, or not a sum of x x^T.
    """
    width = weight.shape[1]
    fmt, size = quantizer.format, quantizer.granularity.width(torch.Size([1, width]))
    assert not isinstance(fmt, FormatSelection), "resolve the format first"
    blocks = quantizer.granularity.split(weight).float()
    quantizer = replace(quantizer, scale=fix_tensor_scale(quantizer.scale, blocks))
    feedback = error_feedback_matrix(hessian, natural_order(hessian), damping)
    original = weight.T.to(hessian.dtype).contiguous()
    hard, error = torch.empty_like(original), torch.empty_like(original)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, width, size):
        stop = start + size
        carried = feedback[start:stop, :start] @ error[:start]
        tile = original[start:stop] + carried
        # Each column of the tile still expects those before it to stay at their original values.
        # The original algorithm has changed all of them by now, each as the changes of those before
        # it demand: change = carried - F change.
        change = torch.linalg.solve_triangular(
            feedback[start:stop, start:stop], carried, upper=False, unitriangular=True
        )
        qparams = quantizer.compute_qparams((original[start:stop] + change).T)
        for name, tensor in as_tensors(qparams).items():
            found[name].append(tensor)
        groups = [(qparams, fmt)] * size
        round_columns(slice(start, stop), tile, original, feedback, groups, hard, error)
    # The blocks of a row are neighbors.
    joined = {name: torch.stack(parts, 1).reshape(-1, 1) for name, parts in found.items()}
    return hard.T.to(weight.dtype), from_tensors(joined)


def qparams_per_column_group(
    qparams: QParams, fmt: Format, rows: int, width: int
) -> list[tuple[QParams, Format]]:
    """Return the qparams and the format of a single column of each group of columns."""
    by_group = {}
    for name, tensor in as_tensors(qparams).items():
        by_group[name] = expand_to_groups(tensor, rows, width)
    if isinstance(fmt, PerBlockFormat):
        by_group["format_index"] = expand_to_groups(fmt.format_index, rows, width)
    num_groups = max(len(tensor) for tensor in by_group.values())
    groups: list[tuple[QParams, Format]] = []
    for i in range(num_groups):
        column_tensors = {}
        for name, tensor in by_group.items():
            column_tensors[name] = tensor[i * len(tensor) // num_groups, :, None]
        column_format = fmt
        if isinstance(fmt, PerBlockFormat):
            column_format = replace(fmt, format_index=column_tensors.pop("format_index"))
        groups.append((from_tensors(column_tensors), column_format))
    return groups


def expand_to_groups(
    part: Shaped[Tensor, "blocks place"], rows: int, width: int
) -> Shaped[Tensor, "groups o"]:
    """Expand a tensor of qparams to one number for each group of columns and each row.

    Args:
        part: Either one number per block, where a block is a part of a row, a row, several rows or
            the whole weight; or one number per position in a block, the same for all blocks. In the
            second case each column is a group.
        rows: Rows of the weight.
        width: Columns of the weight.
    """
    if part.shape[1] > 1:
        return part.expand(rows * width // part.shape[1], -1).reshape(rows, width).T.contiguous()
    if len(part) < rows:
        part = part.repeat_interleave(rows // len(part), 0)
    return part.view(rows, -1).T.contiguous()


def error_feedback_matrix(hessian: Hessian, order: Int[Tensor, "k"], damping: float) -> Hessian:
    """Return the matrix F by which the errors of earlier columns change each column.

    Let d be a row of the error W - W', and H = R R^T with an upper triangular R. The error
    d H d^T is |d R|^2. (d R)_j depends on d_i for i <= j only, and is 0 for
    d_j = -sum_{i<j} d_i R_ij / R_jj. Column j is therefore rounded from w_j + sum_{i<j} F_ji d_i,
    with F_ji = R_ij / R_jj. F is strictly lower triangular in the order of the columns.

    Raises:
        ValueError: If `hessian` is not finite, or not a sum of x x^T.
    """
    if not hessian.isfinite().all():
        raise ValueError(
            "the inputs of a layer hold NaN or infinity, or overflow when squared: look at what "
            "the calibration calls hold, or round this layer to nearest"
        )
    diagonal = hessian.diagonal()
    is_used = diagonal > 0  # False for an input channel that is always 0
    mean = diagonal[is_used].mean() if is_used.any() else diagonal.new_ones(())
    backwards = order.flip(0)
    # `cholesky_ex` factors a matrix as U^T U. If the matrix is H in the opposite order, then U with
    # both axes flipped is R^T.
    matrix = hessian[backwards[:, None], backwards]
    matrix.diagonal().add_(torch.where(is_used, 0, mean)[backwards])
    # If the factorization fails, for example by rounding errors, it is repeated in fp64 and then
    # with more damping.
    attempts = (
        (0, hessian.dtype),
        (0, torch.float64),
        (0.01, torch.float64),
        (0.1, torch.float64),
    )
    for extra_damping, dtype in attempts:
        damped = matrix.to(dtype, copy=True)
        damped.diagonal().add_((damping + extra_damping) * mean)
        factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not failed:
            factor = factor.flip(0, 1).to(hessian.dtype)
            return factor.div_(factor.diagonal()[:, None].clone()).tril_(-1)
    raise ValueError(
        f"the Hessian is indefinite even with a damping of {damping + 0.1:g}, so it is no sum of "
        "x x^T: give gptq the symmetric second moment of the layer's inputs"
    )
