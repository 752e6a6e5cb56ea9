"""Find what goes wrong with checkpoints in the formats of other libraries.

Codes in another order, scales of other blocks and scales that were left at one give images that are
white or noisy, and no error. Some of it shows in the checkpoint alone, and the rest beside the
original weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.qparams import as_tensors, from_tensors
from fp4dit.packed.targets.base import StoredModel, Target
from fp4dit.packed.targets.config_files import read_state
from fp4dit.packed.targets.conversion import build_skeleton, find_reader
from fp4dit.packed.targets.folders import find_transformer, read_config
from fp4dit.packed.targets.grid import GridWeight
from fp4dit.packed.targets.importing import DAMAGE, read_model
from fp4dit.utils.errors import UserError

LARGE_ERROR = 0.4  # relative error of a weight; INT4 and FP4 have 0.05 to 0.2

CURED = 0.5  # the part of an error that is left if its cause is found


@dataclass(frozen=True)
class Finding:
    """Something wrong with a layer, or worth knowing.

    Attributes:
        layer: Name of the layer.
        text: What it is, as a sentence without a full stop.
        is_error: Whether the layer computes something wrong.
    """

    layer: str
    text: str
    is_error: bool = True


def examine_folder(
    path: str, readers: Sequence[Target], original: str | None = None
) -> list[Finding]:
    """Return what is wrong with a transformer in the format of another library.

    Args:
        path: The folder of the transformer or of its pipeline.
        readers: The formats that are read.
        original: The folder of the original transformer or its pipeline, if there is one. Errors
            of weights are only found beside it.

    Raises:
        UserError: if a folder cannot be read at all.

    Example:
        >>> examine_folder("/a/model/in/sdnq", [SDNQ()], original="/a/model")
        []
    """
    folder = find_transformer(path)
    target = find_reader(folder, readers)
    config = read_config(folder)
    config.pop("quantization_config", None)
    skeleton = build_skeleton(config)
    weights = read_state(require_original(original)) if original else {}
    return list(examine_model(read_model(folder, skeleton, target), target, skeleton, weights))


def examine_model(
    model: StoredModel, target: Target, skeleton: nn.Module, original: Mapping[str, Tensor]
) -> Iterator[Finding]:
    """Yield what is wrong with a stored transformer.

    Args:
        model: The transformer.
        target: Its format.
        skeleton: The plain model, without weights.
        original: The original weights by name, where they are known.
    """
    for name, value in model.others.items():
        if value.is_floating_point() and not value.isfinite().all():
            yield Finding(name, "it contains NaN or infinity")
    missing = skeleton.state_dict().keys() - model.others.keys()
    for name in sorted(missing):
        if name.removesuffix(".weight") not in model.layers:
            yield Finding(name, "the checkpoint lacks it")
    for name in model.left:
        if any(part.isdigit() for part in name.split(".")):
            yield Finding(name, "it is in a block of the model, and not quantized", is_error=False)
    for name, layer in model.layers.items():
        try:
            grid = target.decode(layer)
        except DAMAGE as error:
            yield Finding(name, f"it cannot be read: {error}")
            continue
        weight = original.get(f"{name}.weight")
        yield from (Finding(name, text) for text in examine_weight(grid, weight))


def examine_weight(grid: GridWeight, original: Tensor | None) -> Iterator[str]:
    """Yield what is wrong with a weight."""
    tensors = as_tensors(grid.qparams)
    if not all(x.isfinite().all() for x in (grid.points, *tensors.values())):
        yield "its codes or scales contain NaN or infinity"
        return
    scale = tensors["scale"]
    if len(scale) > 1 and bool((scale == scale[0]).all()):
        yield f"all of its {len(scale)} scales are {scale[0].item():g}, as if they were not loaded"
    if not grid.points.any():
        yield "all of its codes are zero"
    if original is None:
        return
    plain = original.float().reshape(len(original), -1)
    if plain.shape != grid.points.shape:
        yield f"the original weight is {list(original.shape)}, which is another shape"
    elif (error := relative_error(grid, plain)) > LARGE_ERROR:
        yield f"its relative error is {error:.2f}{explain_error(grid, plain, error)}"


def explain_error(grid: GridWeight, plain: Float[Tensor, "o k"], error: float) -> str:
    """Return the likely cause of a large error as a clause; an empty text if none is found."""
    causes = {
        "the two halves of each byte seem to be swapped": swap_neighbours(grid),
        "its values seem to be in another order within blocks of 32": interleave_halves(grid),
        "its scales seem to belong to other blocks, or to another layer": fit_scales(grid, plain),
    }
    for cause, cured in causes.items():
        if cured is not None and relative_error(cured, plain) < CURED * error:
            return f": {cause}"
    return ""


def relative_error(grid: GridWeight, plain: Float[Tensor, "o k"]) -> float:
    """Return the error of a weight, relative to the norm of the original one."""
    return ((grid.dequantize() - plain).norm() / plain.norm().clamp(min=1e-30)).item()


def swap_neighbours(grid: GridWeight) -> GridWeight | None:
    """Return a weight whose codes are swapped in pairs."""
    if grid.points.shape[1] % 2:
        return None
    swapped = grid.points.unflatten(1, (-1, 2)).flip(2).flatten(1)
    return replace(grid, points=swapped)


def interleave_halves(grid: GridWeight) -> GridWeight | None:
    """Return a weight read in the order of GGUF, whose bytes hold codes i and i + 16."""
    if grid.points.shape[1] % 32:
        return None
    pairs = grid.points.unflatten(1, (-1, 16, 2))
    return replace(grid, points=pairs.transpose(2, 3).flatten(1))


def fit_scales(grid: GridWeight, plain: Float[Tensor, "o k"]) -> GridWeight | None:
    """Return a weight with the scale of least error for each block."""
    tensors = as_tensors(grid.qparams)
    ones = from_tensors(tensors | {"scale": torch.ones_like(tensors["scale"])})
    codes = ones.from_grid(grid.points.reshape(-1, grid.width))
    blocks = plain.reshape(-1, grid.width)
    product = (codes * blocks).sum(1, keepdim=True)
    scale = product / (codes * codes).sum(1, keepdim=True).clamp(min=1e-30)
    return replace(grid, qparams=from_tensors(tensors | {"scale": scale}))


def describe_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield a line for each thing that was found, with the names of its layers."""
    names_by_text: dict[tuple[bool, str], list[str]] = {}
    for finding in findings:
        names_by_text.setdefault((finding.is_error, finding.text), []).append(finding.layer)
    for (is_error, text), names in sorted(names_by_text.items(), key=lambda item: not item[0][0]):
        yield f"{'error' if is_error else 'note'}: {', '.join(names)}: {text}"


def require_original(path: str) -> Path:
    """Return the folder of an original transformer.

    Raises:
        UserError: if it is quantized.
    """
    folder = find_transformer(path)
    if read_config(folder).get("quantization_config"):
        raise UserError(f"the transformer in {folder} is quantized: give the original one")
    return folder
