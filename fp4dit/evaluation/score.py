"""Scores of images against their references and prompts: all metrics in one pass, by shards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.metrics.base import FeatureExtractor, PerImageMetric, SetMetric
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write_checksummed
from fp4dit.utils.image_files import count_frames
from fp4dit.utils.images import read_image
from fp4dit.utils.resumable import PartialResults
from fp4dit.utils.safetensors_io import save_tensors

# The numbers of images of a batch and of a shard. They are fixed, because the last bits of a value
# depend on the size of its batch.
BATCH_SIZE = 16
SHARD_SIZE = 64


class ScoreShard(NamedTuple):
    """Files of images, with references of the same names in another folder.

    Attributes:
        first: The number of the first image.
        images: The files of the images.
        reference: The folder of the references.
        prompts: The prompt of each image.

    Example:
        >>> for shard in make_shards(Path("images"), Path("reference"), prompts):
        ...     for images, references, captions in shard.load_batches():
        ...         psnr = PSNR().score(images, references, captions)
    """

    first: int
    images: Sequence[Path]
    reference: Path
    prompts: Sequence[str]

    def load_batches(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Yield images, references and prompts, batch by batch.

        Raises:
            UserError: if a file is not an image, or sizes differ.
        """
        size = max(1, BATCH_SIZE // count_frames(self.images[0]))  # bounds the frames in memory
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.images), size):
                paths = self.images[start : start + size]
                reference_paths = [self.reference / path.name for path in paths]
                loaded = list(pool.map(read_image, [*paths, *reference_paths]))
                images, references = stack_pairs(loaded, len(paths))
                yield images, references, list(self.prompts[start : start + size])


def make_shards(images: Path, reference: Path, prompts: Sequence[str]) -> list[ScoreShard]:
    """Divide a folder of images into shards.

    Raises:
        UserError: if there is not one image for each prompt and one reference for each image.
    """
    paths = sorted(images.glob("*.png"))
    if len(paths) != len(prompts) or not paths:
        raise UserError(f"{images} holds {len(paths)} images for {len(prompts)} prompts")
    missing = [path.name for path in paths if not (reference / path.name).is_file()]
    if missing:
        raise UserError(f"{reference} has no {missing[0]} ({len(missing)} missing in all)")
    shards = []
    for first in range(0, len(paths), SHARD_SIZE):
        end = first + SHARD_SIZE
        shards.append(ScoreShard(first, paths[first:end], reference, prompts[first:end]))
    return shards


def stack_pairs(loaded: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Stack the first `count` images, and their references, which follow them.

    Raises:
        UserError: if their sizes differ.
    """
    sizes = {tuple(image.shape[-2:]) for image in loaded}
    if len(sizes) > 1:
        raise UserError(
            f"images and references are of different sizes: {', '.join(map(str, sorted(sizes)))}"
        )
    lengths = {len(image) if image.ndim > 3 else 1 for image in loaded}
    if len(lengths) > 1:
        raise UserError(
            f"videos and references have different numbers of frames: {sorted(lengths)}"
        )
    return torch.stack(list(loaded[:count])), torch.stack(list(loaded[count:]))


def list_score_files(out: Path, shard: ScoreShard) -> list[Path]:
    """Return the only file of the scores of a shard, in a list."""
    return [out / f"{shard.first:05}.safetensors"]


@dataclass
class LayersToRead:
    """The layers of an extractor that metrics read.

    Attributes:
        layers: The names of the layers.
        of_reference: True if a metric also reads the layers for the reference images.
    """

    layers: list[str] = field(default_factory=list)
    of_reference: bool = False


class ScoreTask(L.LightningModule):
    """Scores shards, and writes the values of each metric and the features that set metrics read.

    Args:
        per_image: The metrics with a value for each image, by name.
        per_set: The metrics with a value for the whole set, by name.
        out: The folder of the scores.

    Example:
        >>> task = ScoreTask({"psnr": PSNR()}, {}, Path("scores"))
        >>> trainer.predict(task, load_one_by_one(make_shards(images, reference, prompts)))
        >>> load_shards(Path("scores"))["psnr"].shape
        torch.Size([64])
    """

    def __init__(
        self, per_image: Mapping[str, PerImageMetric], per_set: Mapping[str, SetMetric], out: Path
    ) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(per_image)
        self.layers_to_read = collect_layers(per_set.values())
        self.networks = nn.ModuleList(extractor.load() for extractor in self.layers_to_read)
        self.out = out

    def predict_step(self, shard: ScoreShard) -> None:
        [path] = list_score_files(self.out, shard)
        results = PartialResults(path.with_suffix(".resume"))
        parts: list[dict[str, Tensor]] = results.load()  # the values of each batch
        for images, reference, prompts in islice(shard.load_batches(), len(parts), None):
            images, reference = images.to(self.device), reference.to(self.device)
            scores = self.compute_scores(images, reference, prompts)
            parts.append({name: value.cpu() for name, value in scores})
            results.save(lambda: parts)
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name in self.metrics:
            check_scores(name, values[name], shard)
        with atomic_write_checksummed(path) as part:
            save_tensors(values, part)
        results.remove()

    def compute_scores(
        self, images: Tensor, reference: Tensor, prompts: list[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the values of each metric and the features of each layer, by name."""
        for name, metric in self.metrics.items():
            yield name, score_frames(metric, images, reference, prompts)  # pyright: ignore
        if self.layers_to_read and images.ndim > 4:
            raise UserError("metrics of a set of images do not score videos: choose others")
        extractors = zip(self.layers_to_read.items(), self.networks, strict=True)
        for (extractor, to_read), network in extractors:
            sides = {"images": images}
            if to_read.of_reference:
                sides["reference"] = reference
            for side, pixels in sides.items():
                features = network(pixels)
                for layer in to_read.layers:
                    yield feature_key(extractor, layer, side), features[layer].contiguous()


def score_frames(
    metric: PerImageMetric, images: Tensor, reference: Tensor, prompts: list[str]
) -> Float[Tensor, " n"]:
    """Return one value for each image or video.

    The value of a video is the mean over its frames, unless the metric reads videos.

    Raises:
        UserError: if the metric reads videos, and these are images.
    """
    if metric.reads_videos and images.ndim == 4:
        raise UserError(
            f"the metric {type(metric).__name__} compares the frames of videos, and these are "
            "images: leave it out of metrics"
        )
    if metric.reads_videos or images.ndim == 4:
        return metric.score(images, reference, prompts)
    frames = images.shape[1]
    repeated = [prompt for prompt in prompts for _ in range(frames)]
    pixels, targets = images.flatten(0, 1), reference.flatten(0, 1)
    values = []
    for start in range(0, len(pixels), BATCH_SIZE):  # bounds the memory of a metric's network
        some = slice(start, start + BATCH_SIZE)
        values.append(metric.score(pixels[some], targets[some], repeated[some]))
    return torch.cat(values).reshape(-1, frames).mean(1)


def collect_layers(metrics: Iterable[SetMetric]) -> dict[FeatureExtractor, LayersToRead]:
    """Return the layers of each extractor that the metrics read."""
    layers_to_read: dict[FeatureExtractor, LayersToRead] = {}
    for metric in metrics:
        to_read = layers_to_read.setdefault(metric.extractor, LayersToRead())
        to_read.layers = list(dict.fromkeys([*to_read.layers, *metric.layers]))
        to_read.of_reference |= metric.compares_to_reference
    return layers_to_read


def feature_key(extractor: FeatureExtractor, layer: str, side: str) -> str:
    """Return the name of a layer's features in the files; `side` is `images` or `reference`."""
    return f"{extractor.name}/{layer}/{side}"


def check_scores(name: str, values: Float[Tensor, " n"], shard: ScoreShard) -> None:
    """Check that no value is NaN. A value may be infinite, as the PSNR of equal images is.

    Raises:
        UserError: with the metric and the image of the first NaN.
    """
    for path, prompt, value in zip(shard.images, shard.prompts, values.tolist(), strict=True):
        if isnan(value):
            raise UserError(
                f"{name} has no number for {path} ({prompt!r}): look at the image, and at the "
                "metric's weights"
            )


def load_shards(out: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Load and concatenate the values of all shards, in the order of the images."""
    shards: list[dict[str, Any]] = []
    for path in sorted(out.glob("*.safetensors")):
        shards.append(load_file(path, str(device)))
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
