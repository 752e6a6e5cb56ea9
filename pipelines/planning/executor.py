"""Run the stages of a plan that have no result yet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.planning.plan import PlannedStage, run_stage
from pipelines.runtime.trainer import Runtime

if TYPE_CHECKING:
    from pipelines.stages.base import Stage


def list_pending_stages(
    stages: Mapping[str, PlannedStage], targets: Sequence[str], store: Store
) -> list[PlannedStage]:
    """Return the stages that have to run for the targets, in order.

    A stage whose result is in the store does not make the stages that it needs run.

    Raises:
        UserError: if there are no targets, or one is not a stage.
    """
    if not targets:
        raise UserError(f"targets=[] names no stage: give some of {', '.join(stages)}")
    pending: set[str] = set()
    queue = list(targets)
    while queue:
        name = queue.pop()
        if name not in stages:
            raise UserError(
                f"targets: no stage is called {name!r}; this method has {', '.join(stages)}"
            )
        if name not in pending and store.find_entry(name, stages[name].key) is None:
            pending.add(name)
            queue += stages[name].needs.values()
    return [stage for stage in stages.values() if stage.name in pending]


def execute_plan(
    stages: Mapping[str, PlannedStage], targets: Sequence[str], store: Store, runtime: Runtime
) -> dict[str, Path]:
    """Run what the targets need and what has no result yet, and return the targets' folders.

    Before the first stage runs, the device is looked for, and all stages that will run are built
    and checked, so that a mistake in the last one does not show after an hour of the first.

    Raises:
        UserError: if a stage cannot work with its options, or if memory is full.
    """
    pending = list_pending_stages(stages, targets, store)
    if pending:
        runtime.check_device()
    objects = build_stages(pending)
    for planned in pending:
        needs = {}
        for role, name in planned.needs.items():
            needs[role] = store.get_path(name, stages[name].key)
        run_stage(planned, objects[planned.name], needs, store, runtime)
    return {name: store.get_path(name, stages[name].key) for name in targets}


def build_stages(planned: Sequence[PlannedStage]) -> dict[str, "Stage"]:
    """Build the objects of some stages, by name, and let each check its options.

    Raises:
        UserError: if a stage cannot work with its options.
    """
    objects = {stage.name: stage.instantiate_stage() for stage in planned}
    for name, stage in objects.items():
        check_stage(name, stage)
    return objects


def check_stage(name: str, stage: "Stage") -> None:
    """Let a stage check its options.

    Raises:
        UserError: with the name of the stage, if they cannot work.
    """
    try:
        stage.check()
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error
