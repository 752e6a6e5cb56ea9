"""Fine-tune all quantized weights at once to reproduce the original model's outputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fp4dit.calibration.dataset import UnitBatch, UnitDataset
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import ActivationState, ReadOnlyState, Unit
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.learnable_rounding import LearnableRounding
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import set_timestep
from fp4dit.rounding.learned import LearnedRounding, ReconstructionTask
from fp4dit.rounding.signround import format_to
from fp4dit.rounding.straight_through import straight_through
from fp4dit.utils.calls import Call, remove_hooks
from fp4dit.utils.errors import UserError


class LatentWeight(LearnableRounding):
    """Latent weights in full precision behind hard ones, with a straight-through gradient.

    The latent weights `v` are weights divided by their scales, so that one learning rate suits all
    of them. The scales are fixed. `soft_weight` returns hard weights, so that there is no rounding
    loss, and the trained weights are packed exactly.

    Args:
        weight: The weight in blocks.
        fmt: The number format.
        qparams: The scales and zero points of the blocks.

    Example:
        >>> rounding = layer.start_learning(LatentWeight)
    """

    def __init__(self, weight: Blocks, fmt: Format, qparams: QParams) -> None:
        super().__init__()
        self.format = fmt
        self.v = nn.Parameter(qparams.to_grid(weight))
        self.register_initial_qparams(qparams)

    def soft_weight(
        self, beta: float | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Blocks, float]:
        fmt = format_to(self.format, self.v)
        low, high = torch.as_tensor(fmt.min).to(self.v), torch.as_tensor(fmt.max).to(self.v)
        # In place: a clamp in the autograd graph would give values beyond the ends no gradient, so
        # that they would never return.
        with torch.no_grad():
            self.v.clamp_(low, high)
        rounded = straight_through(self.v, fmt.nearest(self.v.detach()))
        return self.initial_qparams.from_grid(rounded), 0.0

    @torch.no_grad()
    def hard_weight(self) -> Blocks:
        return self.soft_weight()[0]


@torch.no_grad()
def restore_latent_(layer: QuantLayer, original: Float[Tensor, "o k"]) -> None:
    """Replace each hard weight by the original weight if the latter is rounded to the former.

    Training then starts from the position of the weight between two levels. A hard weight would
    have to move by half a step to change its level.

    Args:
        layer: A layer with its hard weight.
        original: The weight in full precision.
    """
    fake_quant = layer.weight_fake_quant
    split = fake_quant.quantizer.granularity.split
    qparams, fmt = fake_quant.qparams, fake_quant.format
    assert qparams is not None, "load the layer first"
    hard, weight = split(layer.weight_matrix).float(), split(layer.transform_weight(original))
    same = fmt.nearest(qparams.to_grid(weight)) == fmt.nearest(qparams.to_grid(hard))
    layer.write_weight(torch.where(same, weight, hard))


@contextmanager
def pass_gradients_through(activations: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Let gradients pass activation quantizers unchanged inside the `with` statement."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return straight_through(args[0], out)

    hooks = [fake_quant.register_forward_hook(hook) for fake_quant in activations.values()]
    with remove_hooks(hooks):
        yield


class WholeModel(nn.Module):
    """A transformer as one unit, from the captured inputs to the outputs of its last unit.

    Args:
        pipeline: The pipeline.

    Example:
        >>> model = WholeModel(pipeline)
        >>> unit = model.make_unit(list(columns))
        >>> outputs = unit.make_call(state)(model)
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.transformer, self.units = pipeline.transformer, list(pipeline.units())

    def make_unit(self, columns: Sequence[str]) -> Unit:
        """Return the model as a unit that reads these inputs of captured calls."""

        def make_call(state: ReadOnlyState) -> Call:
            return Call(({**state},), {})

        return Unit("", tuple(columns), make_call, self.units[-1].outputs)

    def forward(self, state: ActivationState) -> tuple[Tensor, ...]:
        timestep = state["timestep"]
        set_timestep(self.transformer, timestep)
        for unit in self.units:
            # `make_call` runs without autocast, as it did when the targets were computed.
            with torch.autocast(timestep.device.type, enabled=False):
                call = unit.make_call(state)
            output = call(self.transformer.get_submodule(unit.module))
            outputs = unit.read_outputs(output, len(timestep))
            state = state | dict(zip(unit.outputs, outputs, strict=True))
        return tuple(state[name] for name in self.units[-1].outputs)


@dataclass(frozen=True)
class Finetuning(LearnedRounding):
    """Learned rounding of a whole model, whose latent weights are trained together.

    Args:
        average: The decay of the moving average of the weights, with which the training ends;
            None ends with the weights of the last step.

    Example:
        >>> method = Finetuning(
        ...     LatentWeight, partial(fused_adam, lr=2e-3), RelativeMSE(0.0), 1000, 16, average=0.99
        ... )
    """

    average: float | None = None

    def make_task(
        self, module: nn.Module, layers: list[QuantLayer], dataset: UnitDataset
    ) -> "FinetuneTask":
        return FinetuneTask(module, layers, dataset, self)


class FinetuneTask(ReconstructionTask):
    """Learns the latent weights of a whole model, and keeps their moving average."""

    method: Finetuning

    def __init__(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        method: Finetuning,
    ) -> None:
        super().__init__(module, layers, dataset, method)
        self.mean: dict[str, Tensor] | None = None

    @property
    def final_state(self) -> dict[str, Tensor] | None:
        return self.average_weights() if self.method.average is not None else None

    def training_step(self, batch: UnitBatch, _: int) -> Tensor:
        # The mean takes in the weights of a step at the start of the next step. A run that resumes
        # from a checkpoint in between therefore takes in each step exactly once.
        if self.method.average is not None and self.global_step > 0:
            self.mean = self.average_weights()
        return super().training_step(batch, _)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Raise an error if the gradient is not finite, before it changes the weights.

        Raises:
            UserError: with the number of the step.
        """
        gradients = [p.grad for p in self.roundings.parameters() if p.grad is not None]
        if not nn.utils.get_total_norm(gradients).isfinite():
            raise UserError(
                f"step {self.global_step} has no finite gradient: give a smaller "
                "finetune.optimizer.lr. The training then goes on from its last checkpoint"
            )

    @torch.no_grad()
    def average_weights(self) -> dict[str, Tensor]:
        """Return the moving average after it takes in the current weights."""
        state, average = self.roundings.state_dict(), self.method.average or 0.0
        if self.mean is None:
            return {name: p.clone() for name, p in state.items()}
        # The decay grows to `average`, as with `num_updates` in TensorFlow's
        # ExponentialMovingAverage. A constant decay would give the weights before the training a
        # large share in the mean for many steps.
        decay = min(average, self.global_step / (self.global_step + 9))
        return {name: mean.lerp(state[name], 1 - decay) for name, mean in self.mean.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["progress"]["mean"] = self.mean

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.mean = self.move_state(checkpoint["progress"]["mean"])


def check_finetunable(activation: Sequence[Rule]) -> None:
    """Raise an error if activations have scales per timestep, because batches mix timesteps.

    Raises:
        UserError: for such a rule.
    """
    for rule in activation:
        if rule.per_timestep and rule.quantizer is not None:
            raise UserError(
                f"this preset cannot be fine-tuned: its activation rule {rule.match!r} has scales "
                "for each timestep, and a batch has calls of many. Choose activations without "
                "per_timestep"
            )
