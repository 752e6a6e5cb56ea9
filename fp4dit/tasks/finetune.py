"""Fine-tune all quantized weights at once, so that the whole model answers as its original does."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fp4dit.calls import Call, removed
from fp4dit.clock import tell
from fp4dit.errors import UserError
from fp4dit.examples import Example, Examples
from fp4dit.formats import Format
from fp4dit.grid import Grid
from fp4dit.layer import QuantLayer
from fp4dit.models.base import Pipeline
from fp4dit.policy import Rule
from fp4dit.rounding import Rounder
from fp4dit.scaling import Blocks, Scaling
from fp4dit.signround import on, through
from fp4dit.stream import State, Unit, answers
from fp4dit.tasks.reconstruct import BlockReconstructor, Learnt


class Latent(Rounder):
    """Weights in full precision behind the hard ones, which pass their gradients on (a straight-through estimator).

    They are kept in units of the grid, so that one learning rate means the same for all. The scales stay, and the
    weights are always hard, so that there is no indecision and what is learnt packs without loss.
    """

    def __init__(self, weight: Blocks, fmt: Format, scaling: Scaling) -> None:
        super().__init__()
        self.format = fmt
        self.v = nn.Parameter(scaling.to_grid(weight))
        self.remember(scaling)

    def soft(self, beta: float | None = None, dtype: torch.dtype = torch.float32) -> tuple[Blocks, float]:
        fmt = on(self.format, self.v)
        with torch.no_grad():  # a clamp in the graph would stop the gradient at its edge for good
            self.v.clamp_(*(torch.as_tensor(end).to(self.v) for end in (fmt.min, fmt.max)))
        return self.measured.from_grid(through(self.v, fmt.nearest(self.v.detach()))), 0.0

    @torch.no_grad()
    def hard(self) -> Blocks:
        return self.soft()[0]

    @property
    def count(self) -> int:
        return self.v.numel()


@torch.no_grad()
def reopen_(layer: QuantLayer, original: Float[Tensor, "o k"]) -> None:
    """Put the original weight in place of the hard one where that is what it is rounded to: the nearer it is to another
    level, the less it takes to get there."""
    split, scaling, fmt = layer.grid.quantizer.granularity.split, layer.grid.scaling, layer.grid.format
    assert scaling is not None, "load the layer first"
    hard, weight = split(layer.rows).float(), split(layer.changed(original))
    same = fmt.nearest(scaling.to_grid(weight)) == fmt.nearest(scaling.to_grid(hard))
    layer.write(torch.where(same, weight, hard))


@contextmanager
def straight(activations: Mapping[str, Grid]) -> Iterator[None]:
    """Activations whose gradients pass their quantizers as if these were not there."""
    passing = lambda _module, given, out: through(given[0], out)
    hooks = [grid.register_forward_hook(passing) for grid in activations.values()]
    with removed(hooks):
        yield


class Whole(nn.Module):
    """A transformer as one unit: the rows of calls go in, the answers of its last unit come out."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.dit, self.units = pipeline.dit, list(pipeline.units())

    def unit(self, columns: Sequence[str]) -> Unit:
        return Unit(
            "",
            tuple(columns),
            lambda rows: Call(({**rows},), {}),  # pyright: ignore[reportArgumentType]
            self.units[-1].answer,
        )

    def forward(self, state: State) -> tuple[Tensor, ...]:
        tell(self.dit, state["timestep"])
        for unit in self.units:
            with torch.autocast(state["timestep"].device.type, enabled=False):  # made as when they were captured
                call = unit.call(state)
            made = answers(call(self.dit.get_submodule(unit.module)))
            state = state | dict(zip(unit.answer, made, strict=True))
        return tuple(state[name] for name in self.units[-1].answer)


@dataclass(frozen=True)
class Tuning(Learnt):
    """`average` is how much of the mean of all steps' weights stays at each step: what it ends with; None ends with
    the last step's."""

    average: float | None = None

    def task(self, module: nn.Module, layers: list[QuantLayer], examples: Examples) -> "Tuner":
        return Tuner(module, layers, examples, self)


class Tuner(BlockReconstructor):
    plan: Tuning

    def __init__(self, module: nn.Module, layers: list[QuantLayer], examples: Examples, plan: Tuning) -> None:
        super().__init__(module, layers, examples, plan)
        self.mean: dict[str, Tensor] | None = None

    @property
    def chosen(self) -> dict[str, Tensor] | None:
        return self.averaged() if self.plan.average is not None else None

    def training_step(self, batch: Example, _: int) -> Tensor:
        if self.plan.average is not None and self.global_step > 0:  # before, so that a checkpoint is of whole steps
            self.mean = self.averaged()
        return super().training_step(batch, _)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Raises UserError if the gradient is no number, while nothing that is kept has seen it."""
        slopes = [p.grad for p in self.roundings.parameters() if p.grad is not None]
        if not nn.utils.get_total_norm(slopes).isfinite():
            raise UserError(
                f"step {self.global_step} has no finite gradient: give a smaller tuning.optimizer.lr. This goes "
                "on from the last step that was kept"
            )

    @torch.no_grad()
    def averaged(self) -> dict[str, Tensor]:
        """The mean over steps, with the last step's weights in it."""
        now, keep = self.roundings.state_dict(), self.plan.average or 0.0
        if self.mean is None:
            return {name: p.clone() for name, p in now.items()}
        # At first as in a mean of all: else it would remember for long where it began.
        stays = min(keep, self.global_step / (self.global_step + 9))
        return {name: mean.lerp(now[name], 1 - stays) for name, mean in self.mean.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["found"]["mean"] = self.mean

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        mean = checkpoint["found"]["mean"]
        self.mean = mean and {name: p.to(self.device) for name, p in mean.items()}


def check_trainable(activation: Sequence[Rule]) -> None:
    """Raises UserError if the activations cannot be as they are in a batch of calls at several timesteps."""
    for rule in activation:
        if rule.timed and rule.quantizer is not None:
            raise UserError(
                f"this preset cannot be fine-tuned: its activation rule {rule.match!r} has scales for each timestep, "
                "and a batch has calls of many. Choose activations that are not timed"
            )
