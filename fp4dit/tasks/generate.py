"""Generate one image per prompt."""

from pathlib import Path

import lightning as L
from torchvision.transforms.functional import to_pil_image

from fp4dit.health import guarded
from fp4dit.models.base import Pipeline
from fp4dit.tasks.capture import Chunk


class GenerateTask(L.LightningModule):
    """Writes 00000.png ... under `out`; a chunk whose images are all there is not made again."""

    def __init__(self, pipeline: Pipeline, out: Path, steps: int, guidance: float) -> None:
        super().__init__()
        self.pipeline, self.out, self.steps, self.guidance = pipeline, out, steps, guidance

    def predict_step(self, chunk: Chunk) -> None:
        paths = [self.out / f"{chunk.first + i:05}.png" for i in range(len(chunk.prompts))]
        if all(path.exists() for path in paths):
            return
        self.pipeline.to(self.device)
        with guarded(self.pipeline.dit):
            images = self.pipeline.sample(chunk.prompts, chunk.seeds, self.steps, self.guidance)
        for path, image in zip(paths, images, strict=True):
            draft = path.with_suffix(".part")
            to_pil_image(image.cpu().clamp(0, 1)).save(draft, format="PNG")
            draft.rename(path)
