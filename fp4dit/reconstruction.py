"""From captured calls to hard weights: both models advanced side by side, one unit reconstructed after another."""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from fp4dit import policy
from fp4dit.calls import removed
from fp4dit.clock import Clock
from fp4dit.columns import Captured, Column, Room, captured
from fp4dit.errors import UserError
from fp4dit.examples import Examples
from fp4dit.grid import Grid
from fp4dit.layer import QuantLayer
from fp4dit.models.base import Pipeline
from fp4dit.observers import spread
from fp4dit.policy import Rule
from fp4dit.ranges import shares, whole
from fp4dit.resume import Trainers
from fp4dit.store import published
from fp4dit.stream import Columns, State, Unit, advance, needed, relative_error, rows, within
from fp4dit.tasks.reconstruct import Fit, check_fit
from fp4dit.tensors import save_tensors

log = logging.getLogger(__name__)

TrainerFactory = Callable[..., L.Trainer]


def load_calls(folder: Path, room: Room | None = None) -> dict[str, Column]:
    """Every captured call as a row, by file and step. Column `prompt` says whose it is."""
    room = room or Room()
    return {name: room.load(column) for name, column in captured(folder).items()}


def load_steps(folder: Path, trained: int) -> tuple["Steps", "Steps"]:
    """Every captured step, with the rows of the first `trained` prompts, and with those of the others."""
    columns = captured(folder)
    ours, others = split(columns, trained)
    return Steps(columns, ours), Steps(columns, others)


class Steps(Dataset[State]):
    """The given rows of captured calls, step by step: an item holds those that the model was given at once."""

    def __init__(self, columns: Mapping[str, Captured], index: Int[Tensor, "n"]) -> None:
        places = next(iter(columns.values())).places
        by_step: dict[tuple[Path, int], list[int]] = {}
        for i in index.tolist():
            by_step.setdefault(places[i][:2], []).append(i)
        self.columns, self.steps = columns, [torch.tensor(step) for step in by_step.values()]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> State:
        return rows(self.columns, self.steps[index])


def split(columns: Columns, trained: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"]]:
    """The rows of the first `trained` prompts, and those of the others."""
    first = columns["prompt"][:] < trained
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def check(skeleton: nn.Module, weight: Sequence[Rule], fit: Fit, activation: Sequence[Rule] = ()) -> None:
    """Raise what reconstruction would raise about its options, on a model without weights.

    Raises:
        UserError: as `policy.check_weights` and `policy.put`, or if an activation is timed, for timesteps are learnt
            from together.
        ValueError: if the fit cannot round in a format.
    """
    policy.check_weights(skeleton, weight)
    chosen = policy.assign(policy.layers(skeleton), weight)
    for rule in policy.idle(chosen, weight):  # an optional one, or it had been refused
        log.warning("no layer of this model is called %s, which by_row or by_part names", rule.match)
    layers = policy.quantize_weights_(skeleton, chosen, check=False)
    policy.quantize_inputs_(layers, activation)
    check_fit(fit, list(layers.values()))


@dataclass(frozen=True)
class Reconstruction:
    """One model's reconstruction into the folder `out`; units found there are taken, not made again.

    `trained` and `held_out` are rows of the calls: to learn from, and to measure on. The models are advanced
    `size` rows at a time. What depends on a layer's inputs, as transforms do, is fitted to `sample` rows, spread over
    those trained on. Rules for `activation` quantize the layers' inputs while their weights are learnt. What flows
    between units takes its place in `room`. How far a unit is, is kept every so many `seconds`, if its fit can go on.
    """

    pipeline: Pipeline
    rules: Mapping[str, Rule]
    fit: Fit
    trained: Int[Tensor, "n"]
    held_out: Int[Tensor, "m"]
    size: int
    out: Path
    sample: int = 64
    activation: Sequence[Rule] = ()
    room: Room = field(default_factory=Room)
    seconds: float = 60.0

    def run(self, columns: Columns, trainer: Callable[[str], TrainerFactory]) -> list[dict]:
        """The units' reports, in order. `trainer` makes the Trainers for what it is told is being done."""
        original, quantized, reports = {**columns}, {**columns}, []
        clock = Clock()
        units = [clock.told(unit) for unit in self.pipeline.units()]
        check_reached(self.rules, units)
        for number, unit in enumerate(units, 1):
            teacher = copy.deepcopy(self.pipeline.dit.get_submodule(unit.module))
            target = self.forward(teacher, unit, original)
            layers = policy.quantize_weights_(self.pipeline.dit, within(self.rules, unit), clock=clock)
            policy.quantize_inputs_(layers, self.activation)
            module = self.pipeline.dit.get_submodule(unit.module)
            path = self.out / f"{number:03}_{unit.module}.json"
            made = path.exists() and path.with_suffix(".safetensors").exists()
            if made:
                load_layers(layers, path.with_suffix(".safetensors"))
                report = json.loads(path.read_text())
            else:
                examples = Examples(unit, quantized, target, self.trained, self.room)
                self.prepare(unit, teacher, layers, examples)
                label = f"{number}/{len(units)} {unit.module}"
                trainers = Trainers(trainer(label), path.with_suffix(".kept"), self.seconds)
                # A unit that the rules leave alone has nothing to learn.
                curve = self.fit(module, list(layers.values()), examples, trainers) if layers else []
                report = {"unit": unit.module, "error": None, "curve": curve}
            answer = self.forward(module, unit, quantized)
            if not made:
                report["error"] = relative_error(answer, target, self.held_out)
                save_layers(layers, path.with_suffix(".safetensors"))
                with published(path) as part:
                    part.write_text(json.dumps(report))
            shutil.rmtree(path.with_suffix(".kept"), ignore_errors=True)
            reports.append(report)
            later = {name for unit in units[number:] for name in unit.reads}  # all else gives its room back
            original, quantized = needed(later, original | target), needed(later, quantized | answer)
        return reports

    def prepare(self, unit: Unit, teacher: nn.Module, layers: Mapping[str, QuantLayer], examples: Examples) -> None:
        """Choose scales, and fit transforms, where there are any, to what the layers of the original are given here."""
        wanted = {whole(name) for name, layer in layers.items() if layer.wants_inputs}
        local = {name: name.removeprefix(unit.module).lstrip(".") for name in map(whole, layers)}
        index = examples.trained[spread(len(examples.trained), self.sample)]
        seen = sample_inputs(teacher, [local[name] for name in wanted], examples, index)
        for name, inside in local.items():
            x = seen.get(inside)
            if name in wanted and x is None:
                raise UserError(
                    f"what {name} is given cannot be measured, for the model does not call it: "
                    f"+weight.leave=['{name}'] leaves it"
                )
            for layer, its in shares(self.pipeline.dit.get_submodule(name), examples.inputs["timestep"][index]):
                layer.prepare(None if x is None else x[its.repeat_interleave(len(x) // len(its))])

    def forward(self, module: nn.Module, unit: Unit, columns: Columns) -> dict[str, Column]:
        device = self.pipeline.device  # a Trainer leaves its module on the CPU
        return advance(module.to(device), unit, columns, self.size, device, self.room)


@torch.no_grad()
def sample_inputs(
    teacher: nn.Module, names: Iterable[str], examples: Examples, index: Int[Tensor, "n"]
) -> dict[str, Float[Tensor, "n ..."]]:
    """The inputs of the teacher's layers at the given rows; of a layer that reads several vectors for each row, such as
    PixArt-alpha's of height and width, these one after another."""
    seen: dict[str, Tensor] = {}

    def hook(name: str, given: tuple[Tensor, ...]) -> None:
        seen[name] = given[0]

    hooks = [
        teacher.get_submodule(name).register_forward_pre_hook(lambda _m, given, name=name: hook(name, given))  # pyright: ignore[reportArgumentType]
        for name in names
    ]
    if hooks:
        with removed(hooks):
            examples.call(index, next(teacher.parameters()).device)(teacher)
    return seen


def check_reached(rules: Mapping[str, Rule], units: Sequence[Unit]) -> None:
    """Raises UserError if a layer that is to be quantized is in no unit."""
    reached = {name for unit in units for name in within(rules, unit)}
    for name in (name for name, rule in rules.items() if rule.quantizer and name not in reached):
        raise UserError(
            f"{name} cannot be quantized, for the model does not run it: +weight.leave=['{name}'] leaves it"
        )


def save_layers(layers: Mapping[str, QuantLayer], path: Path) -> None:
    tensors = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    with published(path) as part:
        save_tensors(tensors, part)


def load_layers(layers: Mapping[str, QuantLayer], path: Path) -> None:
    """Raises RuntimeError if the file lacks something of one of these layers, or holds more of it."""
    tensors = load_file(path)
    for name, layer in layers.items():
        layer.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})


def load_weights_(
    pipeline: Pipeline, weight: Sequence[Rule], activation: Sequence[Rule], folder: Path
) -> tuple[dict[str, Grid], dict[str, Rule]]:
    """Quantize the model in place to what a reconstruction left in `folder`; the activations' grids and their rules."""
    clock = Clock()
    clock.follow(pipeline.dit)
    rules = policy.assign(policy.layers(pipeline.dit), weight)
    layers = policy.quantize_weights_(pipeline.dit, rules, clock=clock)
    activations = policy.quantize_activations_(pipeline.dit, activation)
    for number, unit in enumerate(pipeline.units(), 1):
        load_layers(within(layers, unit), folder / f"{number:03}_{unit.module}.safetensors")
    return activations
