"""Interfaces of a text-to-image model: `PipelineSource` finds and loads it, `Pipeline` runs it.

Diffusers pipelines inherit from `PretrainedSource` and `TransformerAdapter`, which implement them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fp4dit.models.blocks import ActivationState, ReadOnlyState, Unit
from fp4dit.utils.calls import Call


@runtime_checkable
class Pipeline(Protocol):
    """Text-to-image pipeline whose transformer can also be run unit by unit.

    Attributes:
        transformer: The diffusion transformer, which is the only part that is quantized.
        device: The device of the pipeline.
        options: Keyword arguments of diffusers' pipeline beside prompts, steps and guidance.

    Example:
        >>> pipeline = PixArt("outputs/pixart").load()
        >>> images = pipeline.sample(["a red square"], seeds=[0], steps=20, guidance=4.5)
        >>> state = pipeline.initial_state(call)  # a recorded call of the transformer
        >>> for unit in pipeline.units():
        ...     output = unit.make_call(state)(pipeline.transformer.get_submodule(unit.module))
        ...     state |= zip(unit.outputs, flatten_outputs(output))
    """

    transformer: nn.Module
    device: torch.device
    options: Mapping[str, Any]

    def to(self, device: torch.device | str) -> None:
        """Move the pipeline to a device."""
        ...

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        """Draw one image for each prompt.

        Args:
            prompts: One text, or the name of one class, for each image.
            seeds: The seed of each image. The noise of an image depends on no other seed.
            steps: The number of denoising steps.
            guidance: The scale of classifier-free guidance.

        Returns:
            Images with values in [0, 1].
        """
        ...

    def pipeline_inputs(self, prompts: Sequence[str]) -> Sequence[str | int]:
        """Return the first argument of diffusers' pipeline: texts, or numbers of classes."""
        ...

    def meta_call(self, n: int) -> Call:
        """Return a call of the transformer with `n` samples, as `sample` makes it.

        Its tensors are on the meta device: they have a shape and a dtype, and no content.
        """
        ...

    def initial_state(self, call: Call) -> ActivationState:
        """Return the tensors of a call of the transformer, each with one row per sample.

        The key `timestep` is required, with one number per row: `calibration.capture`,
        `rounding.reconstruction` and `rounding.finetune` read it. The keys `prompt` and `call_kind`
        are reserved. The transformer's `forward` needs an argument for the timestep with one of the
        names of `utils.calls.TIMESTEP_NAMES`.
        """
        ...

    def read_states(self, call: Call) -> list[tuple[Int[Tensor, "n"], ActivationState]]:
        """Return the states of a call, one for each group of samples with equal shapes.

        Returns:
            The numbers of the samples of each group, and their state.
        """
        ...

    def save_call_kinds(self, path: Path) -> None:
        """Save what the calls of a file have in common, if more than their tensors is needed.

        Args:
            path: The file of the captured calls. What is saved lies beside it.
        """
        ...

    def load_call_kinds(self, folder: Path) -> None:
        """Load what `save_call_kinds` saved for the files of a folder.

        It has to be called before layers are replaced, because the transformer may run.
        """
        ...

    def units(self) -> list[Unit]:
        """Return all parts of the transformer that can be quantized, in execution order."""
        ...

    def read_prediction(self, state: ReadOnlyState) -> Float[Tensor, "n values"]:
        """Return what a sampler reads of the state after all units, a row for each sample."""
        ...

    def save(self, folder: Path, base: str) -> None:
        """Save the pipeline as a folder that diffusers loads.

        Args:
            folder: The folder to write to.
            base: The name of the original model, which the configs of the folder mention.
        """
        ...


@runtime_checkable
class PipelineSource(Protocol):
    """Location of a pipeline, and the way to load it.

    A source is light, so that a plan can hold it without loading a weight.

    Example:
        >>> source = PixArt("PixArt-alpha/PixArt-XL-2-1024-MS", dtype="float16")
        >>> source.check(["a red square"])
        >>> [unit.module for unit in source.build_on_meta().units()][:2]
        ['pos_embed', 'adaln_single']
    """

    def load(self) -> Pipeline:
        """Load the pipeline with its weights."""
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Check, before loading, that the model is not quantized and can draw the prompts.

        Raises:
            UserError: if a prompt cannot be drawn, or if the transformer is quantized already.
        """
        ...

    def check_text_encoder(self) -> None:
        """Check, before loading, that there is a text encoder to quantize.

        Raises:
            UserError: if there is none.
        """
        ...

    def build_on_meta(self) -> Pipeline:
        """Build the pipeline on the meta device, without weights.

        The result can do everything but `to` and `sample`.
        """
        ...
