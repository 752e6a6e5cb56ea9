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
from itertools import takewhile
from pathlib import Path

import lightning as L
from jaxtyping import Int
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit, with_timestep
from fp4dit.calibration.saved_rows import SavedRows
from fp4dit.calibration.token_sample import TokenSample
from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import (
    RowSources,
    Unit,
    copy_repeated_modules,
    select_columns,
    split_by_unit,
)
from fp4dit.quantization.apply import quantize_inputs_, quantize_weights_
from fp4dit.quantization.audit import audit_weights
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, match_rules, unused_rules
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.rounding.base import Curve, RoundingMethod, check_curve
from fp4dit.rounding.preparation import check_all_reached, prepare_layers
from fp4dit.rounding.unit_boundary import BoundaryFiles, UnitBoundary
from fp4dit.rounding.unit_files import is_finished, load_layers, save_layers, unit_path
from fp4dit.utils.files import atomic_write_checksummed, read_json
from fp4dit.utils.resumable import ResumableTrainers
from fp4dit.utils.save_timer import LONGEST

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
    names = find_layers(skeleton)
    rules = assign_rules(names, weight)
    # All unused rules are optional here, because `assign_rules` raises an error for others.
    for rule in unused_rules(rules, weight):
        if not match_rules(names, [rule]):  # otherwise an earlier rule has its layers
            log.warning(
                "no layer of this model is called %s, which an optional rule names", rule.match
            )
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
        save_every: The longest time between two saves of the state, in seconds. See `SaveTimer`.
        tokens: The sample of tokens for what is fitted to tokens; None for all tokens.

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
    save_every: float = LONGEST
    tokens: TokenSample | None = None

    def run(
        self,
        columns: RowSources,
        make_trainers: Callable[[str], TrainerFactory],
        track: Callable[[list], Iterable] = iter,
    ) -> list[dict]:
        """Reconstruct all units.

        Args:
            columns: The captured calls.
            make_trainers: Returns a factory of Trainers, given the label of their progress.
            track: Yields the items of a list, and may show how many are done.

        Returns:
            The report of each unit, in order: its name, error and learning curve.
        """
        reports, context = [], TimestepContext()
        units = [with_timestep(unit, context) for unit in self.pipeline.units()]
        check_all_reached(self.rules, units)
        rules = split_by_unit(self.rules, units)
        teachers = copy_repeated_modules(self.pipeline.transformer, units)
        data_options = (self.train_rows, self.memory, self.tokens)
        files = BoundaryFiles(self.folder / "boundary", self.save_every)
        boundary = self.load_boundary(files, units, columns)
        for number, unit in track(list(enumerate(units, 1))):
            path = unit_path(self.folder, number, unit)
            unit_rules = rules[number - 1]
            if number <= boundary.number:
                reports.append(self.load_unit(path, unit, unit_rules, context))
                continue
            module = self.pipeline.transformer.get_submodule(unit.module)
            teacher = teachers.pop(number, None) or copy.deepcopy(module)
            saved = self.find_saved_rows(path, "targets")
            target = self.propagate(teacher, unit, boundary.original, saved)
            report, outputs = self.reconstruct_unit(
                path,
                teacher,
                self.insert_layers(unit_rules, context),
                UnitDataset(unit, boundary.quantized, target, *data_options),
                partial(make_trainers, f"{number}/{len(units)} {unit.label}"),
            )
            reports.append(report)
            # Activations that no later unit reads free their memory.
            read_later = {name for other in units[number:] for name in other.inputs}
            original = select_columns(read_later, {**boundary.original, **target})
            quantized = select_columns(read_later, {**boundary.quantized, **outputs})
            boundary = UnitBoundary(number, original, quantized)
            files.save_if_due(boundary, columns)
        files.remove()
        for folder in self.folder.glob("*.resume"):  # of a run killed at the end of a unit
            shutil.rmtree(folder)
        return reports

    def load_boundary(
        self, files: BoundaryFiles, units: Sequence[Unit], columns: RowSources
    ) -> UnitBoundary:
        """Return the latest activations that a killed run has saved between two units."""
        paths = [unit_path(self.folder, number, unit) for number, unit in enumerate(units, 1)]
        num_finished = len(list(takewhile(is_finished, paths)))
        if num_finished == len(units):
            return UnitBoundary(num_finished, {}, {})  # nothing is left to propagate
        return files.load(columns, self.memory, num_finished)

    def load_unit(
        self, path: Path, unit: Unit, rules: Mapping[str, Rule], context: TimestepContext
    ) -> dict:
        """Load the layers of a finished unit, and return its report."""
        load_layers(self.insert_layers(rules, context), path)
        self.pipeline.transformer.get_submodule(unit.module).to(self.pipeline.device)
        return read_json(path.with_suffix(".json"))

    def find_saved_rows(self, path: Path, name: str) -> SavedRows | None:
        """Return the rows called `name` that a killed run has saved of an unfinished unit."""
        if is_finished(path):
            return None
        return SavedRows(path.with_suffix(".resume") / name, self.save_every)

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
        saved = self.find_saved_rows(path, "outputs")
        if saved is None:
            load_layers(layers, path)
            report = read_json(report_path)
        else:
            trainers = ResumableTrainers(make_trainers(), resume_folder, self.save_every)
            curve = self.round_layers(teacher, layers, dataset, trainers)
            report = {"unit": unit.label, "error": None, "curve": curve}
        module = self.pipeline.transformer.get_submodule(unit.module)
        outputs = self.propagate(module, unit, dataset.inputs, saved)
        if saved is not None:
            report["error"] = compute_relative_error(outputs, dataset.targets, self.val_rows)
            save_layers(layers, path)
            with atomic_write_checksummed(report_path) as part:
                part.write_text(json.dumps(report))
        shutil.rmtree(resume_folder, ignore_errors=True)
        return report, outputs

    def insert_layers(
        self, rules: Mapping[str, Rule], context: TimestepContext
    ) -> dict[str, QuantLayer]:
        """Replace the layers of a unit by quantized ones, and return these by name."""
        layers = quantize_weights_(self.pipeline.transformer, rules, context=context)
        quantize_inputs_(layers, self.activation)
        return layers

    def round_layers(
        self,
        teacher: nn.Module,
        layers: Mapping[str, QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        """Prepare and round the layers of a unit, which may have none.

        The layers are saved after either step, if that is due, and a resumed run loads them.

        Returns:
            The learning curve.
        """
        model = self.pipeline.transformer
        module = model.get_submodule(dataset.unit.module)
        results, curve = trainers.for_part("layers").make_results(), None
        if loaded := results.load():
            [part] = loaded
            curve = part["curve"]
            for name, layer in layers.items():
                layer.load_state_dict(part["states"][name])
            module.to(self.pipeline.device)  # what was loaded is on the CPU
        else:
            prepare_layers(model, teacher, layers, dataset, self.num_sampled)
            results.save(lambda: [{"states": get_states(layers), "curve": None}])
        if curve is None:
            curve = []
            if layers:
                curve = self.method.round_unit(module, list(layers.values()), dataset, trainers)
                check_curve(self.method, curve)
            results.save(lambda: [{"states": get_states(layers), "curve": curve}])
        return curve

    def propagate(
        self, module: nn.Module, unit: Unit, columns: RowSources, saved: SavedRows | None
    ) -> dict[str, RowSource]:
        """Compute the outputs of a unit for all rows that are not saved yet."""
        device = self.pipeline.device  # a Trainer may have left the module on the CPU
        module = module.to(device)
        return propagate_unit(
            module, unit, columns, self.batch_size, device, self.memory, saved=saved
        )


def get_states(layers: Mapping[str, QuantLayer]) -> dict[str, dict[str, Tensor]]:
    """Return the state of each layer by name."""
    return {name: layer.state_dict() for name, layer in layers.items()}
