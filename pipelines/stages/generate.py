"""The stage that generates images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning import LightningModule

from fp4dit.calibration.capture import PromptBatch, batch_prompts
from fp4dit.data.prompts import PromptSource, get_texts
from fp4dit.estimate.footprint import count_bit_operations
from fp4dit.estimate.stages import Estimator, StageCost
from fp4dit.evaluation import generate
from fp4dit.evaluation.generate import GenerateTask
from fp4dit.evaluation.step_cache import StepCache
from fp4dit.lowbit_training.linear import TrainRule, load_trained_
from fp4dit.models.base import PipelineSource
from fp4dit.quantization.audit import checkpoint_bytes
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.unit_files import load_quantized_
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import write_json
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs
from pipelines.stages.second import SecondTransformer
from pipelines.stages.sharded import ShardedStage

Arithmetic = Literal["integer", "simulated"]


@dataclass(frozen=True)
class Generation:
    """Options of the sampler.

    Args:
        steps: The number of steps.
        guidance: The scale of classifier-free guidance.
        batch_size: The number of images that are generated together.
        seed: The seed of the first image's noise; each image has its own.
        cache: What is reused of earlier steps; None for nothing.

    Raises:
        UserError: if a number is out of range.

    Example:
        >>> Generation(steps=20, guidance=4.5, batch_size=16, seed=42)
    """

    steps: int
    guidance: float
    batch_size: int
    seed: int
    cache: StepCache | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError("generation.steps and generation.batch_size must be at least 1")


@dataclass(frozen=True)
class Generate(ShardedStage):
    """Generates one image per prompt. A shard is a batch of prompts.

    The transformer depends on the roles of the inputs: `weights` and `activations` for a quantized
    one, `transformer` for one that was trained with `lowbit_linear`, none for full precision. A
    `second` transformer of the pipeline has roles of its own.
    `arithmetic` says whether products of quantized numbers are summed up exactly, in whole numbers,
    where that is possible, or in the simulation's floating point.

    Example:
        See the nodes `generate` and `reference` of `conf/stages/default.yaml`.
    """

    label = "generate"
    folder = "images"

    model: PipelineSource
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    generation: Generation
    prompts: PromptSource
    count: int
    arithmetic: Arithmetic = "simulated"
    lowbit_linear: Sequence[TrainRule] = ()
    second: SecondTransformer | None = None

    def estimate_cost(self, make_estimator: Callable[[], Estimator]) -> StageCost:
        options, estimator = self.generation, make_estimator()
        return estimator.estimate_sampling(
            self.count,
            options.steps,
            options.guidance,
            options.batch_size,
            self.activation,
            estimator.count_image_bytes(self.count),
            "generation.batch_size",
        )

    def check(self) -> None:
        if self.count < 1:
            raise UserError("prompts.count must be at least 1")
        if self.arithmetic not in get_args(Arithmetic):
            choices = " or ".join(get_args(Arithmetic))
            raise UserError(f"arithmetic={self.arithmetic} is not known: choose {choices}")
        self.model.check(get_texts(self.prompts(self.count)))

    def list_shards(self, needs: Needs) -> list[PromptBatch]:
        options = self.generation
        return batch_prompts(get_texts(self.prompts(self.count)), options.batch_size, options.seed)

    def output_paths(self, item: PromptBatch, folder: Path) -> list[Path]:
        return generate.list_image_files(folder, item)

    def make_task(self, needs: Needs, folder: Path) -> LightningModule:
        pipeline = self.model.load()
        if "transformer" in needs:
            path = needs["transformer"] / "transformer.safetensors"
            load_trained_(pipeline.transformer, path, self.lowbit_linear)
        elif "weights" in needs:
            load_quantized_(
                pipeline,
                self.weight,
                self.activation,
                needs["weights"],
                needs["activations"],
            )
        if self.second:
            self.second.load_(pipeline, needs)
        return GenerateTask(
            pipeline,
            folder,
            self.generation.steps,
            self.generation.guidance,
            self.generation.cache,
            in_integers=self.arithmetic == "integer",
        )

    def finish(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        if not {"transformer", "weights"} & needs.keys():
            skeleton = self.model.build_on_meta()
            summary = {
                "bits_weight": 16,
                "bits_activation": 16,
                "checkpoint_bytes": checkpoint_bytes(skeleton.transformer, []),
                "bit_operations": count_bit_operations(skeleton, [], []),
            }
            write_json(out / "audit.json", summary)
        seeds = []
        for batch in self.list_shards(needs):
            seeds += batch.seeds
        images = []
        for prompt, seed in zip(self.prompts(self.count), seeds, strict=True):
            image: dict[str, Any] = {"prompt": prompt.text, "seed": seed}
            if prompt.group:
                image["group"] = prompt.group
            images.append(image)
        write_json(out / "images.json", images)
