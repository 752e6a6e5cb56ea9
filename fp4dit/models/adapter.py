"""Run the transformer of a diffusers pipeline: `TransformerAdapter`, the base of all adapters.

docs/guides/your-model.md shows how to write an adapter.
"""

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from jaxtyping import Float, Int
from torch import Tensor

from fp4dit.models.blocks import ActivationState, ReadOnlyState, Unit
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import convert_to_os_errors

TRUE_GUIDANCE = "true_cfg_scale"  # of pipelines that may call a transformer with a negative prompt


class TransformerAdapter:
    """Diffusion transformer with the diffusers pipeline around it; the base of all adapters.

    A subclass implements `meta_call`, `initial_state` and `units`; see `fp4dit.models.Pipeline`.

    Args:
        transformer: The transformer. It is set to evaluation mode, and gets no gradients.
        pipe: The pipeline. Without one, the adapter can neither draw nor be saved.

    Attributes:
        options: Keyword arguments of the pipeline beside prompts, steps, guidance and seeds.

    Example:
        >>> adapter = SD3Adapter(pipe.transformer, pipe)
        >>> images = adapter.sample(["a red square"], seeds=[0], steps=20, guidance=4.5)
    """

    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, transformer: ModelMixin, pipe: DiffusionPipeline | None = None) -> None:
        self.transformer: Any = transformer.eval().requires_grad_(False)
        self.pipe: Any = pipe
        self.device = transformer.device
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)

    def meta_call(self, n: int) -> Call:
        """Return a call of the transformer with `n` samples, on the meta device."""
        raise NotImplementedError

    def initial_state(self, call: Call) -> ActivationState:
        """Return the tensors of a call of the transformer, each with one row per sample."""
        raise NotImplementedError

    def read_states(self, call: Call) -> list[tuple[Int[Tensor, "n"], ActivationState]]:
        """Return the states of a call, one for each group of samples with equal shapes.

        Returns:
            The numbers of the samples of each group, and their state.
        """
        state = self.initial_state(call)
        return [(torch.arange(len(state["timestep"])), state)]

    def save_call_kinds(self, path: Path) -> None:
        """Save what the calls of a file have in common, if more than their tensors is needed."""

    def load_call_kinds(self, folder: Path) -> None:
        """Load what `save_call_kinds` saved for the files of a folder."""

    def units(self) -> list[Unit]:
        """Return all parts of the transformer that can be quantized, in execution order."""
        raise NotImplementedError

    def read_prediction(self, state: ReadOnlyState) -> Float[Tensor, "n values"]:
        """Return what a sampler reads of the state after all units, a row for each sample."""
        outputs = [state[name].flatten(1) for name in self.units()[-1].outputs]
        return torch.cat(outputs, 1)

    def to(self, device: torch.device | str) -> None:
        """Move the pipeline, or the transformer alone, to a device."""
        if self.pipe is None:
            self.transformer.to(device)
        else:
            # Diffusers warns that a CPU cannot run float16, but it can.
            self.pipe.to(device, silence_dtype_warnings=True)
        self.device = torch.device(device)

    def save(self, folder: Path, base: str) -> None:
        """Save the pipeline as a folder that diffusers loads.

        Args:
            folder: The folder to write to.
            base: The name that replaces the path of the original model in the configs.

        Raises:
            UserError: if there is a transformer alone.
        """
        if self.pipe is None:
            raise UserError(
                f"this {type(self.transformer).__name__} has no pipeline around it that could be "
                "saved"
            )
        for component in (self.pipe, *self.pipe.components.values()):
            if isinstance(component, ConfigMixin):
                component.register_to_config(_name_or_path=base)
        with convert_to_os_errors(folder):
            self.pipe.save_pretrained(folder)

    def make_meta_tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the meta device, by default of the transformer's dtype."""
        return torch.empty(shape, dtype=dtype or self.transformer.dtype, device="meta")

    def make_meta_latent(self, n: int) -> Float[Tensor, "n c h w"]:
        """Return `n` latents on the meta device."""
        config = self.transformer.config
        return self.make_meta_tensor(n, config.in_channels, config.sample_size, config.sample_size)

    def pipeline_inputs(self, prompts: Sequence[str]) -> Sequence[str | int]:
        """Return the first argument of diffusers' pipeline, which are the prompts by default."""
        return list(prompts)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 h w"]:
        """Draw one image for each prompt; see `fp4dit.models.Pipeline.sample`."""
        inputs = self.pipeline_inputs(prompts)
        return self.run_pipeline(inputs, seeds, steps, guidance, **self.options)

    @torch.no_grad()
    def run_pipeline(
        self,
        inputs: Sequence[str | int] | None,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        **options: Any,
    ) -> Float[Tensor, "n *f 3 h w"]:
        """Run diffusers' pipeline with one generator of noise for each image.

        Args:
            inputs: The first argument of the pipeline; None if the options replace it.
            seeds: The seed of each image.
            steps: The number of denoising steps.
            guidance: The scale of classifier-free guidance.
            options: Further keyword arguments of the pipeline.

        Returns:
            Images with values in [0, 1].
        """
        output = self.pipe(
            **self.name_arguments(inputs and list(inputs), guidance),
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **options,
        )
        return next(iter(output.values())).float()  # images, or the frames of videos

    def name_arguments(self, inputs: Sequence[str | int] | None, guidance: float) -> dict[str, Any]:
        """Return the first argument of the pipeline and the guidance, by their names."""
        first = list(signature(type(self.pipe).__call__).parameters)[1]
        return {first: inputs, "guidance_scale": guidance}


def find_guidance_name(parameters: Mapping[str, Parameter]) -> str | None:
    """Return the name of the guidance scale among the parameters of a pipeline, if it has one.

    If guidance by a second call of the transformer has its own scale, and is used by default, it is
    that; otherwise it may also be a number that the transformer gets.
    """
    true_scale = parameters.get(TRUE_GUIDANCE)
    if true_scale is not None and true_scale.default > 1:
        return TRUE_GUIDANCE
    return "guidance_scale" if "guidance_scale" in parameters else None
