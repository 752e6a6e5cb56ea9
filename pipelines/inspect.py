"""Print what a run does to each layer, and estimate its stages, without loading the model.

If the weights are on this machine, a sample of them tells which 4-bit format fits them best.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from fp4dit.models.hub_files import TRANSFORMER
from fp4dit.models.outline import ModelOutline, find_outline
from fp4dit.models.weight_files import WeightFiles
from fp4dit.quantization.audit import audit_activation_shapes, audit_layers
from fp4dit.quantization.audit_table import ModelAudit, audit_model
from fp4dit.quantization.format_forecast import forecast_formats
from fp4dit.quantization.rules import Rule
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.cli.costs import (
    collect_costs,
    format_costs,
    list_cost_warnings,
    make_estimator,
    warn_of_slow_dtype,
)
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF
from pipelines.planning.checks import check_prompts_disjoint
from pipelines.planning.executor import build_stages, list_pending_stages
from pipelines.planning.instantiate import instantiate_node
from pipelines.planning.plan import PlannedStage, make_plan

if TYPE_CHECKING:
    from fp4dit.estimate.stages import Estimator

LAYERS = ("merged", "all")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="inspect")
def main(cfg: DictConfig) -> None:
    """Print the layers and the estimates, and warn of what does not fit this machine."""
    if cfg.layers not in LAYERS:
        raise UserError(f"layers={cfg.layers}: choose one of {', '.join(LAYERS)}")
    stages = make_plan(cfg)
    images = stages[stages["score"].needs["images"]]
    if cfg.costs:
        print_audit_and_costs(cfg, stages, images)
        return
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    outline = find_outline(model)
    if outline:
        weight: Any = instantiate_node("weight", images.config["weight"])
        audit = audit_outline(outline, images)
    else:
        generate: Any = build_stages([images])[images.name]
        weight, audit = generate.weight, audit_skeleton(generate)
    print_audit(add_forecast(audit, model, weight), cfg.layers)


def print_audit(audit: ModelAudit, layers: str) -> None:
    """Print the table of the layers, and the totals."""
    print(*audit.format_lines(merge=layers == "merged"), sep="\n")
    print("", *audit.format_totals(), sep="\n")


def audit_outline(outline: ModelOutline, images: PlannedStage) -> ModelAudit:
    """Audit a model whose outline is known. Neither its code nor its weights are needed.

    Args:
        outline: The outline of the model.
        images: The stage that generates the images, which has the rules.
    """
    rules = {name: instantiate_node(name, images.config[name]) for name in ("weight", "activation")}
    model = outline.build_module()
    weights = audit_layers(model, rules["weight"])
    quantized = [entry.name for entry in weights if entry.format != "fp16"]
    shapes = outline.select_activations(quantized)
    inputs = audit_activation_shapes(shapes, rules["activation"])
    return audit_model(model, weights, inputs, list(shapes))


def add_forecast(audit: ModelAudit, model: dict[str, Any], weight: Sequence[Rule]) -> ModelAudit:
    """Add which 4-bit format is expected to win, if the weights are on this machine.

    Args:
        audit: The audit of the model.
        model: The node `model` of the config.
        weight: The rules for weights, with roles resolved.
    """
    files = WeightFiles.find(model["path"], model.get("transformer") or TRANSFORMER)
    if files is None:
        return audit
    return replace(audit, forecast=forecast_formats(audit.shapes, weight, files.read_rows))


def audit_skeleton(generate: Any) -> ModelAudit:
    """Audit the model of a stage on the meta device, where its activations are recorded."""
    # Imported here because it takes seconds, and the outline of a model does without it.
    from fp4dit.estimate.audit import audit_transformer

    return audit_transformer(generate.model, generate.weight, generate.activation)


def print_audit_and_costs(
    cfg: DictConfig, stages: dict[str, PlannedStage], images: PlannedStage
) -> None:
    """Print the table of the layers, and estimates of what each stage needs."""
    store = Store(Path(cfg.outputs) / "store")
    pending = [stage.name for stage in list_pending_stages(stages, cfg.targets, store)]
    check_prompts_disjoint(cfg, stages)
    objects = build_stages([stage for stage in stages.values() if "model" in stage.config])
    generate: Any = objects[images.name]
    estimator = make_estimator(cfg, generate)
    model = generate.model.build_on_meta().transformer
    shapes = estimator.footprint.activation_shapes
    inputs = audit_activation_shapes(shapes, generate.activation)
    audit = audit_model(model, audit_layers(model, generate.weight), inputs, list(shapes))
    node: Any = OmegaConf.to_container(cfg.model, resolve=True)
    print_audit(add_forecast(audit, node, generate.weight), cfg.layers)
    pending_objects = {name: objects[name] for name in pending if name in objects}
    costs = collect_costs(pending_objects, lambda: estimator)
    print("", describe_speed(estimator), *format_costs(list(stages), pending, costs), sep="\n")
    warnings = list_cost_warnings(costs, estimator.machine, estimator.budget, cfg.outputs)
    for text in [*warnings, *warn_of_slow_dtype(estimator.machine, estimator.dtype)]:
        print(f"warning: {text}", file=sys.stderr)


def describe_speed(estimator: "Estimator") -> str:
    """Return a sentence about what the estimates are computed from."""
    from fp4dit.estimate.stages import MODEL_SPEED_SHARE

    return (
        f"Rough estimates for one device of this machine ({estimator.machine.device}) at "
        f"{estimator.flops_per_second / 1e9:.3g} GFLOP/s, which is {MODEL_SPEED_SHARE} of the "
        f"speed of a {estimator.dtype} matrix product. Text encoders and autoencoders are not "
        "counted."
    )


if __name__ == "__main__":
    run_command(main)
