"""Plan the stages of a composed config, and run those that have no result yet."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp4dit.store.manifest import compute_key
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.config.validation import check_numbers_finite
from pipelines.planning.instantiate import instantiate_node
from pipelines.planning.stage_kinds import make_identity
from pipelines.runtime.oom import explain_out_of_memory
from pipelines.runtime.trainer import Runtime

if TYPE_CHECKING:
    from pipelines.stages.base import Stage


# The keys of a stage node that belong to its identity, but are not arguments of its class.
IDENTITY_KEYS = ("version", "content", "needs")


@dataclass(frozen=True)
class PlannedStage:
    """A stage that may have to run, with the key of its result.

    Args:
        name: Name of the stage, as in `conf/stages`.
        key: Fingerprint of `identity`, which names the folder of the result.
        needs: Names of the stages that make the inputs, by the role that each input plays.
        config: The arguments of the stage's class, `_target_` included.
        identity: Everything that the result depends on: `config` with tags in place of import
            paths, the stage's version, the hashes of the files that it reads, and the keys of the
            stages that it needs.

    Example:
        >>> make_plan(compose("run", ["method=gptq"]))["capture"].key
        '0123456789abcdef'
    """

    name: str
    key: str
    needs: Mapping[str, str]
    config: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def entry_name(self) -> str:
        """Name of the result in the store, `stage/key`."""
        return f"{self.name}/{self.key}"

    @property
    def node(self) -> dict[str, Any]:
        """The resolved node from which `make_planned_stage` makes this object again."""
        return {**self.identity, **self.config}

    def instantiate_stage(self) -> "Stage":
        """Build the stage object.

        This imports the code that the stage needs, torch included, so do it only before a run.

        Raises:
            UserError: if the config names something that does not exist, or has a wrong value.
        """
        return name_layers_by_role(instantiate_node(self.name, self.config))


def name_layers_by_role(stage: Any) -> Any:
    """Return a stage whose rules for roles of layers are rules for the layers of its model."""
    # Imported here because planning needs no torch.
    from fp4dit.quantization.roles import has_roles, resolve_roles

    if second := getattr(stage, "second", None):
        stage = replace(stage, second=name_layers_by_role(second))
    fields = [name for name in ("weight", "activation") if has_roles(getattr(stage, name, None))]
    if not fields:
        return stage
    model = stage.model.build_on_meta().transformer
    return replace(stage, **{name: resolve_roles(getattr(stage, name), model) for name in fields})


def make_plan(cfg: DictConfig) -> dict[str, PlannedStage]:
    """Return the stages of a config by name, each after the stages that it needs.

    Stages that do not depend on each other keep the order of the config.

    Raises:
        UserError: if a stage needs one that is not defined, or depends on itself.
    """
    stages: dict[str, PlannedStage] = {}
    waiting = resolve_stage_nodes(cfg)
    while waiting:
        name = _find_ready_stage(waiting, stages)
        node = waiting.pop(name)
        needs = node.pop("needs")
        keys = {role: stages[needed].key for role, needed in needs.items()}
        stages[name] = make_planned_stage(name, needs, {**node, "needs": keys})
    return stages


def _find_ready_stage(
    waiting: Mapping[str, Mapping[str, Any]], stages: Mapping[str, PlannedStage]
) -> str:
    """Return the first stage all of whose inputs are planned."""
    for name, node in waiting.items():
        if stages.keys() >= set(node["needs"].values()):
            return name
    name, node = next(iter(waiting.items()))
    missing = next(needed for needed in node["needs"].values() if needed not in stages)
    raise UserError(
        f"stage {name!r} depends on {missing!r}, which is not defined or depends on {name!r} itself"
    )


def make_planned_stage(
    name: str, needs: Mapping[str, str], node: Mapping[str, Any]
) -> PlannedStage:
    """Plan one stage.

    Args:
        name: Name of the stage.
        needs: Names of the stages that make its inputs, by role.
        node: The resolved node of the stage, in which `needs` holds the keys of the inputs.
    """
    check_numbers_finite(name, node)
    config = {key: value for key, value in node.items() if key not in IDENTITY_KEYS}
    identity = make_identity(node)
    return PlannedStage(name, compute_key(identity), needs, config, identity)


def resolve_stage_nodes(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the nodes of all stages as plain values.

    Raises:
        UserError: if a resolver refuses what it is asked for.
    """
    try:
        return OmegaConf.to_container(cfg.stages, resolve=True, throw_on_missing=True)  # pyright: ignore
    except OmegaConfBaseException as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise (cause or error) from None


def run_stage(
    planned: PlannedStage,
    stage: "Stage",
    needs: Mapping[str, Path],
    store: Store,
    runtime: Runtime,
) -> None:
    """Run one stage into the store, or wait for the process that runs it and assist.

    Args:
        planned: The stage as planned.
        stage: The object made from it.
        needs: The folders of its inputs, by role.
        store: The store that receives the result.
        runtime: The device and the progress display.
    """
    identity = dict(planned.identity)
    manifest = {"needs": identity.pop("needs"), "config": identity, "command": runtime.command}
    try:
        store.get_or_make(
            planned.name,
            planned.key,
            lambda out: stage.run(needs, out, runtime),
            manifest,
            lambda out: stage.assist(needs, out, runtime),
        )
    except Exception as error:
        if explanation := explain_out_of_memory(planned.name, planned.config, error):
            raise explanation from error
        raise
