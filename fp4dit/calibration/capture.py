"""Capture the inputs of the transformer while the real sampler runs."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch import nn

from fp4dit.calibration.captured_calls import save_calls
from fp4dit.data.captured import CALL_KIND
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import ActivationState
from fp4dit.models.nan_guard import nan_guard
from fp4dit.utils import calls
from fp4dit.utils.calls import Call, read_timestep
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable_calls import resume_calls


class PromptBatch(NamedTuple):
    """Prompts that are denoised together.

    The batches of a run are fixed, because another batch size changes the last bits of the results.

    Attributes:
        first: The number of the first prompt.
        prompts: The prompts.
        seeds: A seed for each prompt.
    """

    first: int
    prompts: list[str]
    seeds: list[int]


def batch_prompts(prompts: list[str], size: int, seed: int) -> list[PromptBatch]:
    """Split prompts into batches, in order. Prompt i has seed `seed + i`, whatever the size."""
    batches = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        seeds = [seed + first + i for i in range(len(batch))]
        batches.append(PromptBatch(first, batch, seeds))
    return batches


CaptureTransform = Callable[[Sequence[ActivationState], PromptBatch], Sequence[ActivationState]]


def keep_states(states: Sequence[ActivationState], batch: PromptBatch) -> Sequence[ActivationState]:
    """Return the captured inputs unchanged."""
    return states


def noise_at_index(
    states: Sequence[ActivationState], batch: PromptBatch
) -> Sequence[ActivationState]:
    """Replace captured inputs of PixArt by those that FP4DiT's released code calibrates on.

    The latents of every step are noise, the timestep is the index of the step, and no token of the
    text is masked.

    Raises:
        UserError: if the model has no attention mask as PixArt has.
    """
    # `bias` is the attention mask of the text, as a bias of the attention's logits.
    if "bias" not in states[0]:
        raise UserError(
            "calibration=released_code is what FP4DiT's released code does for PixArt: choose "
            "another calibration for this model"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    replaced = []
    for index, state in enumerate(states):
        latent = state["latent"]
        draws = [torch.randn(latent.shape[1:], generator=generator) for generator in generators]
        noise = torch.stack(draws)
        # With guidance each prompt has two rows.
        noise = noise.repeat(len(latent) // len(noise), 1, 1, 1).to(latent)
        timestep = torch.full_like(state["timestep"], index)
        bias = torch.zeros_like(state["bias"])
        replaced.append(state | {"latent": noise, "timestep": timestep, "bias": bias})
    return replaced


def list_capture_files(out: Path, batch: PromptBatch) -> list[Path]:
    """Return a list with the file of a batch, as sharded stages require for each shard."""
    return [out / f"{batch.first:05}.safetensors"]


class CaptureTask(L.LightningModule):
    """Captures the transformer's inputs, with one file for each batch of prompts.

    A killed run continues within a batch: the outputs of the transformer are kept until the batch
    is finished.

    Args:
        pipeline: The pipeline.
        out: The folder of the files.
        steps: The number of the sampler's steps.
        guidance: The scale of classifier-free guidance.
        transform: Changes the captured inputs before they are written.
        num_kept: The number of steps to write, evenly spread from the first to the last; None for
            all.

    Example:
        >>> task = CaptureTask(pipeline, Path("calls"), steps=20, guidance=4.5)
        >>> trainer.predict(task, load_one_by_one(batch_prompts(prompts, 8, seed=0)))
    """

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        steps: int,
        guidance: float,
        transform: CaptureTransform = keep_states,
        num_kept: int | None = None,
    ) -> None:
        super().__init__()
        self.pipeline, self.out = pipeline, out
        self.steps, self.guidance = steps, guidance
        self.transform, self.num_kept = transform, num_kept

    def predict_step(self, batch: PromptBatch) -> None:
        [path] = list_capture_files(self.out, batch)
        pipeline = self.pipeline
        pipeline.to(self.device)
        model, resume_path = pipeline.transformer, path.with_suffix(".resume")
        with (
            resume_calls(model, resume_path, self.device),
            nan_guard(model),
            calls.record_calls(model) as recorded,
        ):
            pipeline.sample(batch.prompts, batch.seeds, self.steps, self.guidance)
        groups = []
        for states in self.group_states(recorded, batch):
            groups.append(self.transform(states, batch))
        pipeline.save_call_kinds(path)
        save_calls(groups, path)
        resume_path.unlink(missing_ok=True)

    def group_states(
        self, recorded: Sequence[Call], batch: PromptBatch
    ) -> Iterable[list[ActivationState]]:
        """Return the inputs at each kept step, for each group of rows whose shapes are equal."""
        if not recorded:
            class_name = type(self.pipeline.transformer).__name__
            raise UserError(
                f"the sampler called this {class_name} in none of its {self.steps} steps: give it "
                "more, with calibration.steps"
            )
        steps = group_by_step(self.pipeline.transformer, recorded)
        count = min(self.num_kept or len(steps), len(steps))
        groups: dict[tuple, list[ActivationState]] = {}
        for i in torch.linspace(0, len(steps) - 1, count).round().int():
            for number, call in enumerate(steps[i]):
                for rows, state in self.pipeline.read_states(call):
                    # With guidance each prompt has two rows.
                    prompts = (rows % len(batch.prompts)) + batch.first
                    on_cpu = {name: value.cpu() for name, value in state.items()}
                    kind = [] if CALL_KIND not in state else state[CALL_KIND].tolist()
                    key = (number, *kind, *rows.tolist())
                    groups.setdefault(key, []).append(on_cpu | {"prompt": prompts})
        return groups.values()


def group_by_step(transformer: nn.Module, recorded: Sequence[Call]) -> list[list[Call]]:
    """Group the calls of a sampler by its steps: consecutive calls at the same timestep."""
    steps: list[list[Call]] = []
    latest = None
    for call in recorded:
        timestep = read_timestep(transformer, call).flatten()[0].item()
        if timestep != latest:
            steps.append([])
        steps[-1].append(call)
        latest = timestep
    return steps
