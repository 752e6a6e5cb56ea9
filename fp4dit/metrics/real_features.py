"""Features of a set of real images, stored in a file, as the reference of metrics."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from fp4dit.metrics.base import FeatureExtractor, Features
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write, file_sha256
from fp4dit.utils.hub import require_weights
from fp4dit.utils.images import read_image
from fp4dit.utils.safetensors_io import save_tensors

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class FeatureFileInfo:
    """Metadata of a file of features.

    Attributes:
        name: Name of the set of images.
        count: Number of images.
        extractor: Name of the feature extractor.
        weights: Checksum of the network's weights; empty if they are a folder.
    """

    name: str
    count: int
    extractor: str
    weights: str


@dataclass(frozen=True)
class RealFeatures:
    """File of features that `collect_features` wrote.

    Args:
        path: Location of the file, as `fp4dit.utils.hub` finds it.

    Example:
        >>> RealFeatures("coco_val2017.safetensors").load_features(extractor)["pool"].shape
        torch.Size([5000, 2048])
    """

    path: str

    @cached_property
    def info(self) -> FeatureFileInfo:
        """Metadata of the file.

        Raises:
            UserError: if there is no such file, or it does not contain features.
        """
        try:
            with safe_open(require_weights(self.path), "pt") as file:
                return FeatureFileInfo(**json.loads(file.metadata()["about"]))
        except UserError:
            raise
        except Exception as error:  # a broken file makes safetensors raise almost anything
            raise UserError(
                f"{self.path} holds no features: python -m pipelines.features makes such a file"
            ) from error

    def load_features(self, extractor: FeatureExtractor) -> Features:
        """Load the features of all layers.

        Raises:
            UserError: if they were computed by another network, or with another resizing filter.
        """
        info, weights = self.info, checksum_weights(extractor)
        if (info.extractor, info.weights) != (extractor.name, weights):
            raise UserError(
                f"{self.path} holds features of {info.extractor} "
                f"({info.weights[:8] or 'a folder'}), and {extractor.name} "
                f"({weights[:8] or 'a folder'}) is asked for: make them again, by "
                "python -m pipelines.features"
            )
        with safe_open(require_weights(self.path), "pt") as file:
            return {layer: file.get_tensor(layer) for layer in file.keys()}


def checksum_weights(extractor: FeatureExtractor) -> str:
    """Return the checksum of the extractor's weights, or "" if they are a folder."""
    weights = require_weights(extractor.path)
    return file_sha256(weights) if weights.is_file() else ""


def list_images(folder: Path) -> list[Path]:
    """List the images in a folder and its subfolders, by name.

    Raises:
        UserError: if there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def collect_features(
    folder: Path, name: str, extractor: FeatureExtractor, device: torch.device | str, out: Path
) -> FeatureFileInfo:
    """Compute the features of every image in a folder, of whatever size, and write them to a file.

    Raises:
        UserError: if an image cannot be read, or there are none.
    """
    paths = list_images(folder)
    network = extractor.load().to(device)
    batches: list[Features] = []
    for path in tqdm(paths, desc=extractor.name, mininterval=1):
        features = network(read_image(path)[None].to(device))
        batches.append({layer: value.cpu() for layer, value in features.items()})
    info = FeatureFileInfo(name, len(paths), extractor.name, checksum_weights(extractor))
    with atomic_write(out) as part:
        save_tensors(join_features(batches), part, {"about": json.dumps(asdict(info))})
    return info


def join_features(batches: Sequence[Features]) -> dict[str, torch.Tensor]:
    """Concatenate the features of each layer over batches."""
    joined = {}
    for layer in batches[0]:
        joined[layer] = torch.cat([batch[layer] for batch in batches]).contiguous()
    return joined
