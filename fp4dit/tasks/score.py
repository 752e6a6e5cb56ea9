"""Score images against their reference and their prompts, image by image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchvision.transforms.functional import to_tensor


class Pairs(Dataset[tuple[Tensor, Tensor, str]]):
    """Images and references in [0, 1], by file name, with their prompts."""

    def __init__(self, images: Path, reference: Path, prompts: Sequence[str]) -> None:
        self.paths = sorted(images.glob("*.png"))
        self.reference, self.prompts = reference, prompts
        if len(self.paths) != len(prompts):
            raise ValueError(f"{images} holds {len(self.paths)} images for {len(prompts)} prompts")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, str]:
        path = self.paths[i]
        return read(path), read(self.reference / path.name), self.prompts[i]


def read(path: Path) -> Float[Tensor, "3 h w"]:
    with Image.open(path) as image:
        return to_tensor(image.convert("RGB"))


class ScoreTask(L.LightningModule):
    """Feeds every metric; `values` holds each one's score per image afterwards."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(metrics)
        self.values: dict[str, list[float]] = {}

    def test_step(self, batch: Sequence[Any]) -> None:
        """A batch of Pairs, which a DataLoader makes a list of."""
        images, reference, prompts = batch
        for metric in self.metrics.values():
            metric.update(images, reference, list(prompts))  # pyright: ignore[reportCallIssue]

    def on_test_end(self) -> None:
        self.values = {name: metric.compute().reshape(-1).tolist() for name, metric in self.metrics.items()}  # pyright: ignore[reportCallIssue]
