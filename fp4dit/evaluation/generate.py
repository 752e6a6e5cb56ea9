"""Generation of one image or video per prompt."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from fp4dit.calibration.capture import PromptBatch
from fp4dit.evaluation.step_cache import StepCache, start_caches
from fp4dit.models.base import Pipeline
from fp4dit.models.hub_files import find_transformers
from fp4dit.models.nan_guard import nan_guard
from fp4dit.packed.integer_inference import use_integer_arithmetic_
from fp4dit.utils.files import atomic_write_checksummed
from fp4dit.utils.images import save_image
from fp4dit.utils.resumable_calls import resume_calls


def list_image_files(out: Path, batch: PromptBatch) -> list[Path]:
    """Return the file of each image of a batch."""
    return [out / f"{batch.first + i:05}.png" for i in range(len(batch.prompts))]


def list_drawing_models(pipeline: Any) -> list[nn.Module]:
    """Return the transformer of a pipeline, and those that draw with it."""
    pipe = getattr(pipeline, "pipe", None)
    others = find_transformers(pipe.components if pipe is not None else {})
    return list(dict.fromkeys([pipeline.transformer, *others.values()]))


class GenerateTask(L.LightningModule):
    """Generates images for batches of prompts, and writes 00000.png, 00001.png, ... to a folder.

    A killed run continues within a batch: the outputs of the transformer are kept until the batch
    is finished.

    Args:
        pipeline: The pipeline.
        out: The folder of the images.
        steps: The number of sampling steps.
        guidance: The scale of classifier-free guidance.
        cache: What is reused of earlier steps; None for nothing. A killed run then begins its
            unfinished batch again.
        in_integers: Whether quantized layers compute in whole numbers where that is exact. They do
            on a CPU for which the kernels were compiled.

    Example:
        >>> task = GenerateTask(pipeline, Path("images"), steps=20, guidance=4.5)
        >>> trainer.predict(task, load_one_by_one(batch_prompts(prompts, 8, seed=0)))
    """

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        steps: int,
        guidance: float,
        cache: StepCache | None = None,
        in_integers: bool = False,
    ) -> None:
        super().__init__()
        self.cache, self.in_integers = cache, in_integers
        self.pipeline, self.out, self.steps, self.guidance = pipeline, out, steps, guidance

    def on_predict_start(self) -> None:
        for model in list_drawing_models(self.pipeline):
            if self.in_integers and self.device.type == "cpu":
                use_integer_arithmetic_(model)
            if self.cache is not None:
                self.cache.apply_(model)

    def predict_step(self, batch: PromptBatch) -> None:
        self.pipeline.to(self.device)
        model = self.pipeline.transformer
        resume_path = self.out / f"{batch.first:05}.resume"
        with ExitStack() as stack:
            if self.cache is None:
                stack.enter_context(resume_calls(model, resume_path, self.device))
            else:
                models = list_drawing_models(self.pipeline)
                stack.enter_context(start_caches(models, self.steps))
            stack.enter_context(nan_guard(model))
            images = self.pipeline.sample(batch.prompts, batch.seeds, self.steps, self.guidance)
        for path, image in zip(list_image_files(self.out, batch), images, strict=True):
            with atomic_write_checksummed(path) as part:
                save_image(image, part)
        resume_path.unlink(missing_ok=True)
