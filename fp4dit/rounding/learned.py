"""Learned rounding: block reconstruction as in BRECQ (arXiv:2102.05426).

The roundings of all weights of a unit are parameters. An optimizer minimizes the distance between
the outputs of the unit and those of the original unit. The inputs are those of the quantized model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from fp4dit.calibration.dataset import UnitBatch, UnitBatches, UnitDataset
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.learnable_rounding import LearnableRounding, RoundingFactory
from fp4dit.rounding.base import Curve, RoundingMethod, iter_blank_blocks
from fp4dit.rounding.input_steps import InputSteps, StepAttachment
from fp4dit.rounding.objectives import ReconstructionObjective
from fp4dit.rounding.timestep_weights import WeightRows
from fp4dit.utils.resumable import ResumableTrainers


@dataclass(frozen=True)
class LearnedRounding(RoundingMethod):
    """Learn the roundings of a whole unit from its output error (BRECQ, arXiv:2102.05426).

    During the warm-up there is no rounding loss. Then the loss pushes each rounding towards 0 or 1.
    Its exponent beta falls linearly. With a large beta only roundings near 0 or 1 have a gradient,
    so that at first the others can still change freely.

    Args:
        learner: Makes the learnable rounding of a layer, such as AdaRound's.
        optimizer: Makes the optimizer from parameters, or from groups of them as torch has them.
        objective: Combines the output error with the rounding loss.
        steps: The number of steps.
        batch_size: The number of rows of a step.
        seed: The seed of the order of the rows.
        precision: The `precision` argument of Lightning's Trainer.
        beta: The exponent of the rounding loss at the end of the warm-up, and at the last step.
        warmup: The share of the steps without rounding loss.
        schedule: Makes a learning rate schedule, which advances at each step.
        keep_best: Whether to end with the parameters of the step with the least error. This suits
            roundings whose soft weights are hard, such as SignRound's. As in AutoRound, the error
            of a step is that of its batch alone, so an easy batch may decide the step.
        weigh_rows: The weight of each row's squared error, by its timestep; None for equal weights.
        inputs: Learns the steps of static inputs together with the roundings; None keeps them as
            they were calibrated.

    Example:
        >>> method = LearnedRounding(
        ...     adaround, partial(fused_adam, lr=1e-2), RelativeMSE(), steps=200, batch_size=16
        ... )
    """

    learner: RoundingFactory
    optimizer: Callable[[Any], Optimizer]
    objective: ReconstructionObjective
    steps: int
    batch_size: int
    seed: int = 0
    precision: str = "32-true"
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    keep_best: bool = False
    weigh_rows: WeightRows | None = None
    inputs: InputSteps | None = None

    def check(self, layers: Sequence[QuantLayer]) -> None:
        if self.inputs is not None:
            self.inputs.check(layers)
        for block, fmt, qparams in iter_blank_blocks(layers):
            self.learner(block, fmt, qparams).soft_weight()

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        task = self.make_task(module, layers, dataset)
        trainers.fit(task, max_steps=self.steps, precision=self.precision, devices=1)
        state = task.final_state
        if state is not None:
            task.learned.load_state_dict(state)
        for layer in layers:
            layer.commit_weight()
        task.inputs.commit()
        return task.curve

    def make_task(
        self, module: nn.Module, layers: list[QuantLayer], dataset: UnitDataset
    ) -> "ReconstructionTask":
        return ReconstructionTask(module, layers, dataset, self)


class ReconstructionTask(L.LightningModule):
    """Learns the roundings of one unit in one `Trainer.fit`.

    `curve` holds the error, as a share of that of round to nearest, and the mean rounding loss, at
    about 20 evenly spaced steps and at the last one. A checkpoint holds the roundings, their
    optimizer and the progress, but not the unit.

    Args:
        module: The unit.
        layers: The quantized layers of the unit.
        dataset: The unit's data.
        method: The options of the method.

    Example:
        >>> task = ReconstructionTask(module, layers, dataset, method)
        >>> lightning.Trainer(max_steps=method.steps).fit(task)
        >>> error = task.curve[-1]["error"]  # as a share of that of round to nearest
    """

    def __init__(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        method: LearnedRounding,
    ) -> None:
        super().__init__()
        self.method, self.layers, self.dataset = method, layers, dataset
        self.roundings = nn.ModuleList(layer.start_learning(method.learner) for layer in layers)
        self.inputs = StepAttachment(layers if method.inputs else ())
        self.learned = nn.ModuleList([*self.roundings, *self.inputs.steps])
        self.module = module
        # At least 1, because there may be nothing to learn but the steps of inputs.
        self.count = max(1, sum(rounding.num_roundings for rounding in self.learnable_roundings))
        self.curve: Curve = []
        self.best_state: dict[str, Tensor] | None = None
        self.register_buffer("least_error", torch.tensor(torch.inf), persistent=False)
        self.register_buffer("rtn_error", torch.zeros(()), persistent=False)

    @property
    def learnable_roundings(self) -> list[LearnableRounding]:
        return list(self.roundings)  # pyright: ignore[reportReturnType]

    @property
    def final_state(self) -> dict[str, Tensor] | None:
        """The parameters to end with, if they are not those of the last step."""
        return self.best_state

    def train_dataloader(self) -> DataLoader:
        """Return the batches from the current step on, which is not 0 for a resumed training."""
        method = self.method
        batches = UnitBatches(self.dataset, method.batch_size, method.seed, self.global_step)
        return DataLoader(batches, batch_size=None)

    def training_step(self, batch: UnitBatch, _: int) -> Tensor:
        if self.global_step == 0:
            # Before the first update, the hard weights are the weights rounded to nearest.
            with torch.no_grad():
                self.rtn_error = self.compute_error(batch)
        beta = self.beta if self.progress >= self.method.warmup else None
        with use_soft_weights(self.layers, beta) as rounding_loss:
            error = self.compute_error(batch)
        if self.method.keep_best:
            self.update_best(error.detach())
        self.record_point(error, rounding_loss)
        return self.method.objective(error, self.rtn_error, rounding_loss, self.count)

    def compute_error(self, batch: UnitBatch) -> Tensor:
        # `make_call` runs without autocast, as it did when the targets were computed.
        with torch.autocast(self.device.type, enabled=False):
            unit = self.dataset.unit
            call = unit.make_call(batch.rows)
        output = unit.read_outputs(call(self.module), len(batch.target[0]))
        if self.method.weigh_rows is None:
            return self.method.objective.error(output, batch.target)
        factors = self.method.weigh_rows(batch.rows["timestep"]).sqrt()
        return self.method.objective.error(
            scale_rows(output, factors), scale_rows(batch.target, factors)
        )

    def record_point(self, error: Tensor, rounding_loss: Any) -> None:
        interval = max(1, self.method.steps // 20)
        if self.global_step % interval == 0 or self.global_step == self.method.steps - 1:
            relative_error = (error.detach() / self.rtn_error).item()
            mean_loss = torch.as_tensor(rounding_loss).detach().item() / self.count
            self.curve.append(
                {"step": self.global_step, "error": relative_error, "rounding_loss": mean_loss}
            )

    @torch.no_grad()
    def update_best(self, error: Tensor) -> None:
        """Keep the parameters if their error is the least so far.

        The choice is made on the device, so that the CPU does not wait for a GPU.
        """
        better = error < self.least_error
        if better.is_cpu and not better:
            return
        self.least_error = torch.where(better, error, self.least_error)
        state = self.learned.state_dict()
        if self.best_state is None:
            self.best_state = {name: p.clone() for name, p in state.items()}
        for name, best in self.best_state.items():
            torch.where(better, state[name], best, out=best)

    def configure_optimizers(self) -> Any:
        method, steps = self.method, list(self.inputs.steps.parameters())
        if not steps:
            optimizer = method.optimizer(self.roundings.parameters())
            schedule = method.schedule and method.schedule(optimizer)
        else:
            assert method.inputs is not None
            roundings = list(self.roundings.parameters())
            groups = [{"params": roundings}] if roundings else []
            optimizer = method.optimizer([*groups, {"params": steps, "lr": method.inputs.lr}])
            make_schedule = method.schedule or partial(
                method.inputs.make_schedule, steps=method.steps
            )
            schedule = make_schedule(optimizer)
        if schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def state_dict(self, *args: Any, **kw: Any) -> dict[str, Any]:
        return self.learned.state_dict(*args, **kw)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kw: Any) -> Any:
        return self.learned.load_state_dict(state_dict, *args, **kw)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {
            "curve": self.curve,
            "rtn_error": self.rtn_error,
            "least_error": self.least_error,
            "best_state": self.best_state,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.curve = progress["curve"]
        self.rtn_error = progress["rtn_error"].to(self.device)
        self.least_error = progress["least_error"].to(self.device)
        self.best_state = self.move_state(progress["best_state"])

    def move_state(self, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Copy parameters of a checkpoint to the device of the task."""
        return state and {name: p.to(self.device) for name, p in state.items()}

    @property
    def progress(self) -> float:
        """The share of the steps that are done."""
        return self.global_step / self.method.steps

    @property
    def beta(self) -> float:
        """The exponent of the rounding loss at this step."""
        start, end = self.method.beta
        warmup = self.method.warmup
        return start + (end - start) * max(0.0, (self.progress - warmup) / (1 - warmup))


def scale_rows(
    outputs: tuple[Tensor, ...], factors: Float[Tensor, "n"]
) -> tuple[Float[Tensor, "n ..."], ...]:
    """Multiply each row of some tensors by its factor, in fp32."""
    return tuple(y.float() * factors.view(-1, *[1] * (y.ndim - 1)) for y in outputs)


@contextmanager
def use_soft_weights(
    layers: Sequence[QuantLayer], beta: float | None
) -> Iterator[Float[Tensor, ""] | float]:
    """Let the layers compute with their soft weights inside the `with` statement.

    Yields:
        The sum of the layers' rounding losses.
    """
    rounding_loss = sum(layer.use_soft_weight(beta) for layer in layers)
    try:
        yield rounding_loss
    finally:
        for layer in layers:
            layer.soft_weight = None


def fused_adam(parameters: Iterable[Any], lr: float) -> Optimizer:
    """Return torch's fused Adam."""
    return torch.optim.Adam(parameters, lr, fused=True)
