"""The stage that records calibration calls, and the options of the calibration data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning import LightningModule

from fp4dit.calibration import capture
from fp4dit.calibration.capture import (
    CaptureTask,
    CaptureTransform,
    PromptBatch,
    batch_prompts,
    keep_states,
)
from fp4dit.calibration.token_sample import TokenSample
from fp4dit.data.prompts import PromptSource, get_texts
from fp4dit.estimate.stages import Estimator, StageCost, count_calls
from fp4dit.models.base import PipelineSource
from fp4dit.utils.errors import UserError
from pipelines.stages.base import Needs
from pipelines.stages.sharded import ShardedStage


@dataclass(frozen=True)
class Calibration:
    """Options of the calibration data.

    Args:
        prompts: Returns the prompts, given their number.
        num_prompts: The number of prompts that scales and rounding are fitted to.
        num_val_prompts: The number of further prompts on which errors are measured.
        batch_size: The number of prompts that are denoised together.
        seed: The seed of the first prompt's noise. Each prompt has its own seed.
        steps: The number of the sampler's steps.
        guidance: The scale of classifier-free guidance.
        transform: Changes the captured calls before they are written.
        timesteps: The number of sampler steps to keep, evenly spread; None for all.
        tokens: The number of tokens of each call that are sampled for what is fitted to tokens and
            not to sequences, such as GPTQ's moments; None for all.

    Raises:
        UserError: if a number is out of range.

    Example:
        >>> Calibration(prompts, 24, 8, batch_size=8, seed=1000, steps=20, guidance=4.5)
    """

    prompts: PromptSource
    num_prompts: int
    num_val_prompts: int
    batch_size: int
    seed: int
    steps: int
    guidance: float
    transform: CaptureTransform = keep_states
    timesteps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.num_val_prompts < 1 or self.batch_size < 1:
            raise UserError(
                "calibration.num_prompts, calibration.num_val_prompts and calibration.batch_size "
                "must be at least 1"
            )
        if self.timesteps is not None and not 1 <= self.timesteps <= self.steps:
            raise UserError(
                f"calibration.timesteps={self.timesteps}: the sampler has {self.steps} steps, keep "
                "1 or more of them"
            )
        if self.tokens is not None and self.tokens < 1:
            raise UserError(
                f"calibration.tokens={self.tokens}: sample 1 or more tokens of each call, or give "
                "null for all"
            )

    @property
    def token_sample(self) -> TokenSample | None:
        """The sample of tokens of each call; None for all tokens."""
        return None if self.tokens is None else TokenSample(self.tokens, self.seed)

    @property
    def num_steps_kept(self) -> int:
        """The number of sampler steps whose calls are kept."""
        return self.timesteps or self.steps

    @property
    def num_rows(self) -> tuple[int, int]:
        """The numbers of calls for fitting and for measuring errors."""
        train = count_calls(self.num_prompts, self.num_steps_kept, self.guidance)
        return train, count_calls(self.num_val_prompts, self.num_steps_kept, self.guidance)

    @property
    def replay_batch_size(self) -> int:
        """The largest number of calls in a batch. With guidance each prompt has two calls."""
        return 2 * self.batch_size

    @property
    def prompt_texts(self) -> list[str]:
        """The texts of all prompts, for fitting and for measuring."""
        return get_texts(self.prompts(self.num_prompts + self.num_val_prompts))


@dataclass(frozen=True)
class Capture(ShardedStage):
    """Captures the transformer's calls while the sampler runs. A shard is a batch of prompts.

    Example:
        See the node `capture` of `conf/stages/default.yaml`.
    """

    label = "capture"
    folder = "calls"

    model: PipelineSource
    calibration: Calibration

    def estimate_cost(self, make_estimator: Callable[[], Estimator]) -> StageCost:
        options, estimator = self.calibration, make_estimator()
        prompts = options.num_prompts + options.num_val_prompts
        return estimator.estimate_sampling(
            prompts,
            options.steps,
            options.guidance,
            options.batch_size,
            [],
            estimator.count_capture_bytes(prompts, options.num_steps_kept, options.guidance),
            "calibration.batch_size",
        )

    def check(self) -> None:
        self.model.check(self.calibration.prompt_texts)

    def list_shards(self, needs: Needs) -> list[PromptBatch]:
        options = self.calibration
        return batch_prompts(options.prompt_texts, options.batch_size, options.seed)

    def output_paths(self, item: PromptBatch, folder: Path) -> list[Path]:
        return capture.list_capture_files(folder, item)

    def make_task(self, needs: Needs, folder: Path) -> LightningModule:
        options = self.calibration
        return CaptureTask(
            self.model.load(),
            folder,
            options.steps,
            options.guidance,
            options.transform,
            options.num_steps_kept,
        )
