"""Calibrate static activation quantizers, and replay captured calls with hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.calibration.token_sample import TokenSample
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import ActivationState
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import set_timestep
from fp4dit.utils.calls import remove_hooks
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import save_tensors

# A function of the name, the input and the output of a quantizer. It returns a tensor to use as the
# output instead, or None.
ActivationHook = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def hook_activations(
    activations: Mapping[str, FakeQuantize], hook: ActivationHook
) -> Iterator[None]:
    """Call `hook` for every activation that is quantized inside the `with` statement."""

    def call_hook(name: str, _module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Any:
        return hook(name, args[0], out)

    handles = []
    for name, module in activations.items():
        handles.append(module.register_forward_hook(partial(call_hook, name)))
    with remove_hooks(handles):
        yield


class ReplayTask(L.LightningModule):
    """Replays captured calls, unit by unit, and calls `on_activation` for every activation.

    Args:
        pipeline: The pipeline.
        activations: The quantizers of the activations, by name.

    Example:
        >>> class PrintActivations(ReplayTask):
        ...     def on_activation(self, name, timestep, x, out):
        ...         print(name, timestep, tuple(x.shape))
        >>> trainer.test(PrintActivations(pipeline, activations), steps)
    """

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, FakeQuantize]) -> None:
        super().__init__()
        self.pipeline, self.activations = pipeline, activations

    def test_step(self, state: ActivationState) -> None:
        model = self.pipeline.transformer
        self.pipeline.to(self.device)
        timestep = float(state["timestep"][0])
        set_timestep(model, state["timestep"])

        def hook(name: str, x: Tensor, out: Tensor) -> Tensor | None:
            return self.on_activation(name, timestep, x, out)

        with hook_activations(self.activations, hook):
            for unit in self.pipeline.units():
                output = unit.make_call(state)(model.get_submodule(unit.module))
                outputs = unit.read_outputs(output, len(state["timestep"]))
                state = state | dict(zip(unit.outputs, outputs, strict=True))
        self.on_prediction(self.pipeline.read_prediction(state))

    def get_progress(self) -> dict[str, Any]:
        """Return what the task has collected, as tensors and plain values for a file."""
        raise NotImplementedError

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        """Continue from what `get_progress` returned."""
        raise NotImplementedError

    def on_prediction(self, prediction: Tensor) -> None:
        """Handle what the transformer predicts in a call, a row for each sample."""

    def on_activation(self, name: str, timestep: float, x: Tensor, out: Tensor) -> Tensor | None:
        """Handle an activation.

        Args:
            name: The name of the activation.
            timestep: The timestep of the call.
            x: The activation in full precision.
            out: The quantized activation.

        Returns:
            The tensor to use in place of `out`, or None to use `out`.
        """
        raise NotImplementedError


class ObserveTask(ReplayTask):
    """Observes unquantized activations, from which `calibrate` chooses their static scales.

    Args:
        pipeline: The pipeline.
        activations: The quantizers of all activations, by name.
        rules: The rules of the activations to observe.
        tokens: The sample of tokens of each call that is observed; None for all tokens.

    Example:
        >>> task = ObserveTask(pipeline, activations, rules)
        >>> trainer.test(task, steps)
        >>> task.calibrate()
    """

    def __init__(
        self,
        pipeline: Pipeline,
        activations: Mapping[str, FakeQuantize],
        rules: Mapping[str, Rule],
        tokens: TokenSample | None = None,
    ) -> None:
        super().__init__(pipeline, {name: activations[name] for name in rules})
        self.rules, self.tokens = rules, tokens
        self.observations: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in rules}

    def on_activation(self, name: str, timestep: float, x: Tensor, out: Tensor) -> Tensor:
        observer = self.rules[name].observer
        assert observer is not None
        observations, seen = self.observations[name], x
        if self.tokens:
            seen = self.tokens.select_call(x, timestep, len(observations))
        observations.append((timestep, observer.summarize(seen)))
        return x

    def get_progress(self) -> dict[str, Any]:
        progress = {}
        for name, observations in self.observations.items():
            # One tensor for each activation, because a file of many small ones is slow to read.
            progress[name] = {
                "timesteps": [timestep for timestep, _ in observations],
                "shapes": [list(summary.shape) for _, summary in observations],
                "values": torch.cat([x.flatten() for _, x in observations] or [torch.empty(0)]),
            }
        return progress

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        for name, saved in progress.items():
            sizes = [prod(shape) for shape in saved["shapes"]]
            summaries = []
            for values, shape in zip(saved["values"].split(sizes), saved["shapes"], strict=True):
                summaries.append(values.view(shape))
            self.observations[name] = list(zip(saved["timesteps"], summaries, strict=True))

    def calibrate(self) -> None:
        """Choose the static scales of all observed activations.

        Raises:
            UserError: if the model never read one of them.
        """
        check_all_read([name for name in self.rules if not self.observations[name]])
        for name, fake_quant in self.activations.items():
            if isinstance(fake_quant, TimestepFakeQuantize):
                samples = {}
                for timestep, _ in self.observations[name]:
                    if timestep not in samples:
                        samples[timestep] = self.gather_observations(name, timestep)
                fake_quant.calibrate_per_timestep(samples)
            else:
                fake_quant.calibrate(self.gather_observations(name))

    def gather_observations(self, name: str, timestep: float | None = None) -> Tensor:
        """Merge the observations of an activation, at one timestep or at all."""
        observer = self.rules[name].observer
        assert observer is not None
        summaries = []
        for observed_timestep, summary in self.observations[name]:
            if timestep in (None, observed_timestep):
                summaries.append(summary)
        return observer.merge(summaries).to(self.pipeline.device)


def check_all_read(unread: Sequence[str]) -> None:
    """Raise an error if there are activations that the model never read.

    Raises:
        UserError: if there are such activations. It names the first three.
    """
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise UserError(
            f"{', '.join(unread[:3])}{more} would not be quantized: the model never reads them, or "
            "its attention does not call F.scaled_dot_product_attention. To leave them in 16 bits: "
            f"+activation.ignore=['{unread[0]}'], which understands wildcards"
        )


def save_scales(activations: Mapping[str, FakeQuantize], path: Path) -> None:
    """Write the calibrated tensors of static quantizers. Dynamic quantizers have none."""
    tensors = {}
    for name, fake_quant in activations.items():
        for key, value in fake_quant.state_dict().items():
            tensors[f"{name}.{key}"] = value
    save_tensors(tensors, path)


def load_scales_(activations: Mapping[str, FakeQuantize], path: Path) -> None:
    """Load what `save_scales` wrote, in place.

    Raises:
        UserError: if the file has no scale of a static quantizer.
    """
    tensors = load_file(path)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in activations}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name in states:
            states[name][key] = value
    for name, fake_quant in activations.items():
        fake_quant.load_state_dict(states[name])
        if fake_quant.static and fake_quant.qparams is None:
            raise UserError(f"{path} holds no scale for the static activation {name}")
