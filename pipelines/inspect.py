"""Print what a run does to each layer, and estimate its stages, without loading a weight."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from fp4dit.estimate.stages import MODEL_SPEED_SHARE, audit_activation_shapes
from fp4dit.models.base import Pipeline
from fp4dit.quantization.audit import LayerAudit, audit_layer, audit_weights
from fp4dit.quantization.rules import Rule, find_layers
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.cli.costs import collect_costs, format_costs, list_cost_warnings, make_estimator
from pipelines.cli.layer_table import format_layer_table, format_totals
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF
from pipelines.planning.checks import check_prompts_disjoint
from pipelines.planning.executor import build_stages, list_pending_stages
from pipelines.planning.plan import make_plan

LAYERS = ("merged", "all")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="inspect")
def main(cfg: DictConfig) -> None:
    """Print the layers and the estimates, and warn of what does not fit this machine."""
    if cfg.layers not in LAYERS:
        raise UserError(f"layers={cfg.layers}: choose one of {', '.join(LAYERS)}")
    stages, store = make_plan(cfg), Store(Path(cfg.outputs) / "store")
    pending = [stage.name for stage in list_pending_stages(stages, cfg.targets, store)]
    check_prompts_disjoint(cfg, stages)
    objects = build_stages([stage for stage in stages.values() if "model" in stage.config])
    generate: Any = objects[stages["score"].needs["images"]]
    skeleton = generate.model.build_on_meta()
    estimator = make_estimator(cfg, generate)
    shapes = estimator.footprint.activation_shapes
    weights = audit_layers(skeleton, generate.weight)
    inputs = audit_activation_shapes(shapes, generate.activation)
    merge = cfg.layers == "merged"
    print(*format_layer_table(skeleton, list(shapes), weights, inputs, merge), sep="\n")
    print("", *format_totals(skeleton, weights, inputs), "", sep="\n")
    pending_objects = {name: objects[name] for name in pending if name in objects}
    costs = collect_costs(pending_objects, lambda: estimator)
    print(
        f"Rough estimates for one device of this machine ({estimator.machine.device}) at "
        f"{estimator.flops_per_second / 1e9:.0f} GFLOP/s, which is {MODEL_SPEED_SHARE} of the "
        f"speed of a {estimator.dtype} matrix product. Text encoders and autoencoders are not "
        "counted.",
        *format_costs(list(stages), pending, costs),
        sep="\n",
    )
    for text in list_cost_warnings(costs, estimator.machine, estimator.budget, cfg.outputs):
        print(f"warning: {text}", file=sys.stderr)


def audit_layers(skeleton: Pipeline, rules: Sequence[Rule]) -> list[LayerAudit]:
    """Audit the weights of a model; without rules, all of them are in full precision."""
    if rules:
        return audit_weights(skeleton.transformer, rules)
    layers = find_layers(skeleton.transformer)
    return [audit_layer(name, layer, None) for name, layer in layers.items()]


if __name__ == "__main__":
    run_command(main)
