"""Generate one image per prompt."""

from pathlib import Path

import lightning as L
from torchvision.transforms.functional import to_pil_image

from fp4dit.health import guarded
from fp4dit.models.base import Pipeline
from fp4dit.store import published
from fp4dit.tasks.capture import Chunk


def files(out: Path, chunk: Chunk) -> list[Path]:
    return [out / f"{chunk.first + i:05}.png" for i in range(len(chunk.prompts))]


class GenerateTask(L.LightningModule):
    """Writes 00000.png ... under `out`."""

    def __init__(self, pipeline: Pipeline, out: Path, steps: int, guidance: float) -> None:
        super().__init__()
        self.pipeline, self.out, self.steps, self.guidance = pipeline, out, steps, guidance

    def predict_step(self, chunk: Chunk) -> None:
        self.pipeline.to(self.device)
        with guarded(self.pipeline.dit):
            images = self.pipeline.sample(chunk.prompts, chunk.seeds, self.steps, self.guidance)
        for path, image in zip(files(self.out, chunk), images, strict=True):
            with published(path) as part:
                to_pil_image(image.cpu().clamp(0, 1)).save(part, format="PNG")
