"""Print what a run would do to each layer, and roughly what its stages would take here, without loading a weight."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from fp4dit import policy
from fp4dit.errors import UserError
from fp4dit.estimate import SHARE, Estimator, activations
from fp4dit.footprint import footprint
from fp4dit.machine import Machine
from fp4dit.models.base import Pipeline
from fp4dit.policy import Entry, Rule
from fp4dit.store import Store
from pipelines.command import command
from pipelines.disjoint import check_disjoint
from pipelines.listing import expected, listed, warnings
from pipelines.plan import check, pending, plan
from pipelines.resolvers import CONF
from pipelines.runtime import Runtime
from pipelines.units import size

LAYERS = ("alike", "all")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="inspect")
def main(cfg: DictConfig) -> None:
    if cfg.layers not in LAYERS:
        raise UserError(f"layers={cfg.layers}: choose one of {', '.join(LAYERS)}")
    steps, store = plan(cfg), Store(Path(cfg.outputs) / "store")
    todo = [step.name for step in pending(steps, cfg.targets, store)]
    stages = {name: step.make() for name, step in steps.items() if "model" in step.config}
    drawing = stages[steps["score"].needs["images"]]
    skeleton = drawing.model.skeleton()
    check_disjoint(cfg, steps)
    for name, stage in stages.items():
        check(name, stage)
    weights, own = audit(skeleton, drawing.weight), footprint(skeleton, drawing.weight)
    inputs, at = activations(own.seen, drawing.activation), estimator(cfg, drawing)
    print(*listed(skeleton, list(own.seen), weights, inputs, cfg.layers == "all"), sep="\n")
    print("", *totals(skeleton, weights, inputs), "", sep="\n")
    costs = {name: stages[name].cost(at) for name in todo if name in stages}
    print(
        f"Estimated, roughly, for one device here ({at.machine.device}) at {at.speed / 1e9:.0f} GFLOP/s, which is "
        f"{SHARE} of what a product of {at.dtype} matrices reaches. Not counted: text encoders and autoencoders.",
        *expected(list(steps), todo, costs),
        sep="\n",
    )
    for text in warnings(costs, at.machine, at.budget, cfg.outputs):
        print(f"warning: {text}", file=sys.stderr)


def estimator(cfg: DictConfig, drawing: Any) -> Estimator:
    """For the model that the stage `drawing` draws with, here."""
    skeleton = drawing.model.skeleton()
    dtype: Any = skeleton.dit.dtype
    machine = Machine.here(device(Runtime.of(cfg)), dtype, Path(cfg.outputs))
    return Estimator(footprint(skeleton, drawing.weight), machine, 1e9 * cfg.memory_budget_gb, dtype)


def audit(skeleton: Pipeline, rules: Sequence[Rule]) -> list[Entry]:
    """Of full precision too, which has no rules."""
    if rules:
        return policy.check_weights(skeleton.dit, rules)
    return [policy.entry(name, layer, None) for name, layer in policy.layers(skeleton.dit).items()]


def totals(skeleton: Pipeline, weights: Sequence[Entry], inputs: Sequence[Entry]) -> Iterator[str]:
    packed, whole = (policy.checkpoint_bytes(skeleton.dit, entries) for entries in (weights, []))
    quantized = sum(e.format != "fp16" for e in weights)
    bits = policy.effective_bits(inputs) if inputs else 16.0
    yield f"layers       {quantized} of {len(weights)} quantized: {policy.effective_bits(weights):.2f} bits per weight"
    yield f"activations  {len(inputs)} quantized: {bits:.2f} bits per value"
    yield f"checkpoint   {size(packed)}; {size(whole)} in 16 bits"


def device(runtime: Runtime) -> Any:
    """The torch.device to estimate for: the CPU, with a warning, where what is asked for is not."""
    try:
        return runtime.device
    except UserError as error:
        print(f"warning: {error}. Estimated for the CPU", file=sys.stderr)
        return Runtime({"accelerator": "cpu", "devices": 1}).device


if __name__ == "__main__":
    command(main)()
