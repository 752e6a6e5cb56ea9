"""Reconstruct a model unit by unit, from captured calls to hard weights.

Both models are propagated side by side. Each unit is rounded so that it maps the inputs of the
quantized model to the outputs of the original one.
"""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit, with_timestep
from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import (
    RowSources,
    Unit,
    filter_by_unit,
    select_columns,
)
from fp4dit.quantization.apply import quantize_inputs_, quantize_weights_
from fp4dit.quantization.audit import audit_weights
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.observers import spread_indices
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, unused_rules
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import base_layer_name, rows_per_range
from fp4dit.rounding.base import Curve, RoundingMethod
from fp4dit.rounding.unit_files import load_layers, save_layers, unit_path
from fp4dit.utils.calls import remove_hooks
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write_checksummed, read_json
from fp4dit.utils.resumable import ResumableTrainers

log = logging.getLogger(__name__)

TrainerFactory = Callable[..., L.Trainer]


def check_reconstruction(
    skeleton: nn.Module,
    weight: Sequence[Rule],
    method: RoundingMethod,
    activation: Sequence[Rule] = (),
) -> None:
    """Check the options of a reconstruction on a model without weights.

    Raises:
        UserError: if no layer would be quantized, if a rule that is not optional matches no layer,
            or if the activation rules have scales per timestep, because a step learns from many
            timesteps.
        ValueError: if the method cannot round in a format.
    """
    audit_weights(skeleton, weight)
    rules = assign_rules(find_layers(skeleton), weight)
    # All unused rules are optional here, because `assign_rules` raises an error for others.
    for rule in unused_rules(rules, weight):
        log.warning("no layer of this model is called %s, which an optional rule names", rule.match)
    layers = quantize_weights_(skeleton, rules, check=False)
    quantize_inputs_(layers, activation)
    method.check(list(layers.values()))


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of a model, whose units are rounded in order.

    Args:
        pipeline: The pipeline of the model, which is quantized in place.
        rules: The rule of each layer.
        method: The rounding method.
        train_rows: The rows of the calls to learn from.
        val_rows: The rows of the calls to measure on.
        batch_size: The number of rows of a forward pass that propagates a model.
        folder: The folder of the results. A unit whose results it contains is loaded, not rounded.
        num_sampled: The number of training rows that transforms and static scales are fitted to.
        activation: The rules for activations while the weights are rounded.
        memory: The budget for the activations between units.
        save_every: The seconds between checkpoints within a unit.

    Example:
        >>> reconstruction = Reconstruction(
        ...     pipeline, rules, RoundToNearest(), train_rows, val_rows, 16, Path("units")
        ... )
        >>> reports = reconstruction.run(load_calls(Path("calls")), lambda label: lightning.Trainer)
    """

    pipeline: Pipeline
    rules: Mapping[str, Rule]
    method: RoundingMethod
    train_rows: Int[Tensor, "n"]
    val_rows: Int[Tensor, "m"]
    batch_size: int
    folder: Path
    num_sampled: int = 64
    activation: Sequence[Rule] = ()
    memory: MemoryBudget = field(default_factory=MemoryBudget)
    save_every: float = 60.0

    def run(
        self, columns: RowSources, make_trainers: Callable[[str], TrainerFactory]
    ) -> list[dict]:
        """Reconstruct all units.

        Args:
            columns: The captured calls.
            make_trainers: Returns a factory of Trainers, given the label of their progress.

        Returns:
            The report of each unit, in order: its name, error and learning curve.
        """
        original, quantized, reports = {**columns}, {**columns}, []
        context = TimestepContext()
        units = [with_timestep(unit, context) for unit in self.pipeline.units()]
        check_all_reached(self.rules, units)
        for number, unit in enumerate(units, 1):
            teacher = copy.deepcopy(self.pipeline.transformer.get_submodule(unit.module))
            target = self.propagate(teacher, unit, original)
            layers = self.insert_layers(unit, context)
            report, outputs = self.reconstruct_unit(
                unit_path(self.folder, number, unit),
                teacher,
                layers,
                UnitDataset(unit, quantized, target, self.train_rows, self.memory),
                partial(make_trainers, f"{number}/{len(units)} {unit.module}"),
            )
            reports.append(report)
            # Activations that no later unit reads free their memory.
            read_later = {name for other in units[number:] for name in other.inputs}
            original = select_columns(read_later, original | target)
            quantized = select_columns(read_later, quantized | outputs)
        return reports

    def reconstruct_unit(
        self,
        path: Path,
        teacher: nn.Module,
        layers: Mapping[str, QuantLayer],
        dataset: UnitDataset,
        make_trainers: Callable[[], TrainerFactory],
    ) -> tuple[dict, dict[str, RowSource]]:
        """Round the layers of a unit, or load them if an earlier run has finished the unit.

        Args:
            path: The file of the layers. The report is a JSON file beside it.
            teacher: The unit's module in the original model.
            layers: The quantized layers of the unit.
            dataset: The unit's data.
            make_trainers: Returns a factory of Trainers.

        Returns:
            The report of the unit, and its outputs in the quantized model for all rows.
        """
        unit, report_path = dataset.unit, path.with_suffix(".json")
        resume_folder = path.with_suffix(".resume")
        is_finished = report_path.exists() and path.exists()
        if is_finished:
            load_layers(layers, path)
            report = read_json(report_path)
        else:
            self.prepare_layers(teacher, layers, dataset)
            trainers = ResumableTrainers(make_trainers(), resume_folder, self.save_every)
            curve = self.round_layers(layers, dataset, trainers)
            report = {"unit": unit.module, "error": None, "curve": curve}
        module = self.pipeline.transformer.get_submodule(unit.module)
        outputs = self.propagate(module, unit, dataset.inputs)
        if not is_finished:
            report["error"] = compute_relative_error(outputs, dataset.targets, self.val_rows)
            save_layers(layers, path)
            with atomic_write_checksummed(report_path) as part:
                part.write_text(json.dumps(report))
        shutil.rmtree(resume_folder, ignore_errors=True)
        return report, outputs

    def insert_layers(self, unit: Unit, context: TimestepContext) -> dict[str, QuantLayer]:
        """Replace the layers of a unit by quantized ones, and return these by name."""
        rules = filter_by_unit(self.rules, unit)
        layers = quantize_weights_(self.pipeline.transformer, rules, context=context)
        quantize_inputs_(layers, self.activation)
        return layers

    def round_layers(
        self, layers: Mapping[str, QuantLayer], dataset: UnitDataset, trainers: ResumableTrainers
    ) -> Curve:
        """Round the layers of a unit, which may have none, and return the learning curve."""
        if not layers:
            return []
        module = self.pipeline.transformer.get_submodule(dataset.unit.module)
        return self.method.round_unit(module, list(layers.values()), dataset, trainers)

    def prepare_layers(
        self, teacher: nn.Module, layers: Mapping[str, QuantLayer], dataset: UnitDataset
    ) -> None:
        """Choose scales, and fit transforms to the inputs of the original model's layers.

        Args:
            teacher: The unit's module in the original model.
            layers: The quantized layers of the unit.
            dataset: The unit's data.

        Raises:
            UserError: if a layer needs inputs and the model does not call it.
        """
        local_names = {}
        for name in map(base_layer_name, layers):
            local_names[name] = name.removeprefix(dataset.unit.module).lstrip(".")
        need_inputs = set()
        for name, layer in layers.items():
            if layer.needs_calibration_inputs:
                need_inputs.add(base_layer_name(name))
        rows = dataset.train_rows
        sampled_rows = rows[spread_indices(len(rows), self.num_sampled)]
        names = [local_names[name] for name in need_inputs]
        inputs = sample_inputs(teacher, names, dataset, sampled_rows)
        timesteps = dataset.inputs["timestep"][sampled_rows]
        for name, local_name in local_names.items():
            x = inputs.get(local_name)
            if name in need_inputs and x is None:
                raise UserError(
                    f"{name} cannot be calibrated, because the model does not call it: "
                    f"+weight.ignore=['{name}'] leaves it in 16 bits"
                )
            layer_or_ranges = self.pipeline.transformer.get_submodule(name)
            for layer, layer_rows in rows_per_range(layer_or_ranges, timesteps):
                if x is None:
                    layer.prepare(None)
                else:
                    # A layer may read several vectors for each row.
                    vectors = layer_rows.repeat_interleave(len(x) // len(layer_rows))
                    layer.prepare(x[vectors])

    def propagate(self, module: nn.Module, unit: Unit, columns: RowSources) -> dict[str, RowSource]:
        """Compute the outputs of a unit for all rows."""
        device = self.pipeline.device  # a Trainer may have left the module on the CPU
        return propagate_unit(
            module.to(device), unit, columns, self.batch_size, device, self.memory
        )


@torch.no_grad()
def sample_inputs(
    teacher: nn.Module, names: Iterable[str], dataset: UnitDataset, index: Int[Tensor, "n"]
) -> dict[str, Float[Tensor, "n ..."]]:
    """Return the inputs of the teacher's layers at the given rows.

    Some layers read several vectors for each row, as PixArt-alpha's embeddings of height and width
    do. The vectors of a row then follow one another.
    """
    inputs: dict[str, Tensor] = {}

    def hook(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    hooks = []
    for name in names:
        layer = teacher.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(partial(hook, name)))
    if hooks:
        with remove_hooks(hooks):
            dataset.make_call(index, next(teacher.parameters()).device)(teacher)
    return inputs


def check_all_reached(rules: Mapping[str, Rule], units: Sequence[Unit]) -> None:
    """Raise an error if a layer with a quantizer belongs to no unit.

    Raises:
        UserError: for the first such layer.
    """
    reached = set()
    for unit in units:
        reached |= filter_by_unit(rules, unit).keys()
    for name, rule in rules.items():
        if rule.quantizer and name not in reached:
            raise UserError(
                f"{name} cannot be quantized, because the model does not run it: "
                f"+weight.ignore=['{name}'] leaves it in 16 bits"
            )
