"""Score images against their reference and their prompts: every metric in one pass, shard by shard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from fp4dit.errors import UserError
from fp4dit.metrics.base import Extractor, Images, PerImage, PerSet
from fp4dit.store import published
from fp4dit.tensors import save_tensors

BATCH, SHARD = 16, 64  # fixed, for a batch of another size differs in the last bits


class Shard(NamedTuple):
    """Images in the files of one folder and their references in another, by the same names. `first` is the number of
    the first one."""

    first: int
    images: Sequence[Path]
    reference: Path
    prompts: Sequence[str]

    def batches(self) -> Iterator[tuple[Images, Images, list[str]]]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.images), BATCH):
                paths = self.images[start : start + BATCH]
                found = pool.map(read, [*paths, *(self.reference / path.name for path in paths)])
                images, references = same_sized(list(found), len(paths))
                yield images, references, list(self.prompts[start : start + BATCH])


def shards(images: Path, reference: Path, prompts: Sequence[str]) -> list[Shard]:
    """Raises UserError if there is not an image for each prompt, and a reference for each image."""
    paths = sorted(images.glob("*.png"))
    if len(paths) != len(prompts) or not paths:
        raise UserError(f"{images} holds {len(paths)} images for {len(prompts)} prompts")
    lacking = [path.name for path in paths if not (reference / path.name).is_file()]
    if lacking:
        raise UserError(f"{reference} has no {lacking[0]} ({len(lacking)} missing in all)")
    parts = range(0, len(paths), SHARD)
    return [Shard(i, paths[i : i + SHARD], reference, prompts[i : i + SHARD]) for i in parts]


def read(path: Path) -> Float[Tensor, "3 h w"]:
    """In [0, 1]. Raises UserError if it is not an image."""
    try:
        with Image.open(path) as image:
            return to_tensor(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # a broken PNG is a SyntaxError to Pillow
        raise UserError(f"{path} is no image ({error}): delete it and run again, and it will be drawn again") from error


def same_sized(found: Sequence[Tensor], count: int) -> tuple[Images, Images]:
    sizes = {tuple(image.shape[1:]) for image in found}
    if len(sizes) > 1:
        raise UserError(f"images and references are of different sizes: {', '.join(map(str, sorted(sizes)))}")
    return torch.stack(list(found[:count])), torch.stack(list(found[count:]))


def files(out: Path, shard: Shard) -> list[Path]:
    return [out / f"{shard.first:05}.safetensors"]


class ScoreTask(L.LightningModule):
    """Writes for each shard what every metric says of its images, and the features that metrics of the set read."""

    def __init__(self, per_image: Mapping[str, PerImage], per_set: Mapping[str, PerSet], out: Path) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(per_image)
        self.read = wanted(per_set.values())
        self.networks = nn.ModuleList(extractor.load() for extractor in self.read)
        self.out = out

    def predict_step(self, shard: Shard) -> None:
        [path] = files(self.out, shard)
        found: dict[str, list[Tensor]] = {}
        for images, reference, prompts in shard.batches():
            for name, value in self.said(images.to(self.device), reference.to(self.device), prompts):
                found.setdefault(name, []).append(value.cpu())
        values = {name: torch.cat(parts) for name, parts in found.items()}
        for name in self.metrics:
            check(name, values[name], shard)
        with published(path) as part:
            save_tensors(values, part)

    def said(self, images: Images, reference: Images, prompts: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name, metric in self.metrics.items():
            yield name, metric.score(images, reference, prompts)  # pyright: ignore[reportCallIssue]
        for (extractor, (layers, twice)), network in zip(self.read.items(), self.networks, strict=True):
            for side, given in (("images", images), ("reference", reference))[: 1 + twice]:
                features = network(given)
                yield from ((feature(extractor, layer, side), features[layer].contiguous()) for layer in layers)


def wanted(metrics: Iterable[PerSet]) -> dict[Extractor, tuple[list[str], bool]]:
    """The layers that are read of each extractor, and whether of the reference too."""
    found: dict[Extractor, tuple[list[str], bool]] = {}
    for metric in metrics:
        layers, twice = found.get(metric.extractor, ([], False))
        found[metric.extractor] = list(dict.fromkeys([*layers, *metric.layers])), twice or metric.compares
    return found


def feature(extractor: Extractor, layer: str, side: str) -> str:
    return f"{extractor.name}/{layer}/{side}"


def check(name: str, values: Float[Tensor, " n"], shard: Shard) -> None:
    """Raises UserError if a score is no number. An infinite one may be right, as PSNR of equal images."""
    for path, prompt, value in zip(shard.images, shard.prompts, values.tolist(), strict=True):
        if isnan(value):
            raise UserError(f"{name} has no number for {path} ({prompt!r}): look at it, and at the metric's weights")


def gathered(out: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What all shards hold, in the order of the images."""
    parts: list[dict[str, Any]] = [load_file(path, str(device)) for path in sorted(out.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
