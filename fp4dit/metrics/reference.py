"""Features of a set of real images, made once and kept in a file, for numbers that compare with them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from fp4dit.errors import UserError
from fp4dit.metrics.base import Extractor, Features
from fp4dit.store import checksum, whole
from fp4dit.tasks.score import read
from fp4dit.tensors import save_tensors
from fp4dit.weights import need

KINDS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Known:
    """What a file of features is of. `weights` is the checksum of the network's file, of which a folder has none."""

    name: str
    count: int
    extractor: str
    weights: str


@dataclass(frozen=True)
class RealSet:
    """A file that `collect` made."""

    path: str

    @cached_property
    def known(self) -> Known:
        """Raises UserError if there is no such file, or it is another kind of file."""
        try:
            with safe_open(need(self.path), "pt") as file:
                return Known(**json.loads(file.metadata()["about"]))
        except UserError:
            raise
        except Exception as error:  # a broken file makes safetensors raise almost anything
            raise UserError(f"{self.path} holds no features: python -m pipelines.features makes such a file") from error

    def features(self, extractor: Extractor) -> Features:
        """Raises UserError if they are another network's, or of images that were resized by another filter."""
        known = self.known
        if (known.extractor, known.weights) != (extractor.name, identity(extractor)):
            raise UserError(
                f"{self.path} holds features of {known.extractor} ({known.weights[:8] or 'a folder'}), and "
                f"{extractor.name} ({identity(extractor)[:8] or 'a folder'}) is asked for: make them again, by "
                "python -m pipelines.features"
            )
        with safe_open(need(self.path), "pt") as file:
            return {layer: file.get_tensor(layer) for layer in file.keys()}


def identity(extractor: Extractor) -> str:
    place = need(extractor.path)
    return checksum(place) if place.is_file() else ""


def images_of(folder: Path) -> list[Path]:
    """In the order of their names. Raises UserError if there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(KINDS)})")
    return found


def collect(folder: Path, name: str, extractor: Extractor, device: torch.device | str, out: Path) -> Known:
    """The features of every image in a folder, whatever their sizes, into a file.

    Raises:
        UserError: if an image cannot be read, or there are none.
    """
    paths = images_of(folder)
    network = extractor.load().to(device)
    found: list[Features] = [
        {layer: value.cpu() for layer, value in network(read(path)[None].to(device)).items()}
        for path in tqdm(paths, desc=extractor.name, mininterval=1)
    ]
    known = Known(name, len(paths), extractor.name, identity(extractor))
    with whole(out) as part:
        save_tensors(joined(found), part, {"about": json.dumps(asdict(known))})
    return known


def joined(parts: Sequence[Features]) -> dict[str, torch.Tensor]:
    layers: Iterable[str] = parts[0]
    return {layer: torch.cat([part[layer] for part in parts]).contiguous() for layer in layers}
