"""Plan many runs at once, and cache the plans.

Composing the 44 rows of a large table takes about 20 s of CPU time, which is too long to wait for a
table. A cached plan is valid while all config files and the code that reads them are unchanged,
and while the resolvers that read other files return the same answers as before.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import omegaconf
from hydra import __version__ as hydra_version
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from fp4dit import registry
from fp4dit.store import manifest
from fp4dit.store.manifest import compute_key, read_cache, write_cache
from fp4dit.utils import files, hub
from fp4dit.utils.errors import UserError
from pipelines.config import compose, resolvers, validation
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF, FILE_RESOLVERS, register_resolvers
from pipelines.planning import plan, stage_kinds
from pipelines.planning.plan import PlannedStage, make_plan, make_planned_stage

# The modules whose code determines a plan, besides this one.
SOURCE_MODULES = (plan, stage_kinds, compose, resolvers, validation, registry, manifest, hub, files)

# The name of a resolver, its arguments, and its result.
Answer = list[Any]


@dataclass(frozen=True)
class RunPlan:
    """The stages of one run, or the reason why they cannot be planned yet.

    Args:
        stages: The planned stages by name; empty if there is a problem.
        problem: A message, such as that a file which a stage reads does not exist.
        model: The path of the model.
        differs: How the preset differs from its authors' code, in sentences.
    """

    stages: Mapping[str, PlannedStage] = field(default_factory=dict)
    problem: str = ""
    model: str = ""
    differs: Sequence[str] = ()


def plan_runs(
    runs: Sequence[Sequence[str]], outputs: str, searchpath: Sequence[str] = ()
) -> list[RunPlan]:
    """Plan runs of `conf/run.yaml`, each given by its overrides.

    Args:
        runs: The overrides of each run.
        outputs: The folder whose store holds the results and the cache.
        searchpath: Further folders of configs, as in `hydra.searchpath`.

    Raises:
        UserError: if a folder of `searchpath` is not a local one.
    """
    path = Path(outputs) / "store" / ".plans.json"
    sources = hash_sources([CONF, *map(parse_searchpath, searchpath)])
    cache = read_cache(path)
    entries = cache["plans"] if cache.get("read") == sources else {}
    checker, num_new, plans = AnswerChecker(outputs), 0, []
    interval = 0.2 if sys.stderr.isatty() else 10.0
    for overrides in tqdm(runs, "plan", leave=False, mininterval=interval, delay=interval):
        key = compute_key({"overrides": list(overrides)})
        entry = entries.get(key)
        if entry is None or not all(map(checker.is_unchanged, entry["answers"])):
            answers, run_plan = compose_plan(overrides, outputs)
            entries[key] = _pack_plan(answers, run_plan)
            num_new += 1
        else:
            run_plan = _unpack_plan(entry)
        plans.append(run_plan)
    if num_new:
        write_cache(path, {"read": sources, "plans": entries})
    return plans


def _pack_plan(answers: Sequence[Answer], run_plan: RunPlan) -> dict[str, Any]:
    stages = {}
    for name, stage in run_plan.stages.items():
        stages[name] = {"needs": stage.needs, "node": stage.node}
    fields = {name: getattr(run_plan, name) for name in ("problem", "model", "differs")}
    return {"answers": answers, "stages": stages, **fields}


def _unpack_plan(entry: Mapping[str, Any]) -> RunPlan:
    stages = {}
    for name, stage in entry["stages"].items():
        stages[name] = make_planned_stage(name, stage["needs"], stage["node"])
    return RunPlan(stages, entry["problem"], entry["model"], entry["differs"])


def compose_plan(overrides: Sequence[str], outputs: str) -> tuple[list[Answer], RunPlan]:
    """Compose and plan one run, and record the answers of the resolvers that read files."""
    config = compose_config("run", overrides)
    config.outputs = outputs
    model, differs = OmegaConf.select(config, "model.path") or "", list(config.differs)
    with record_answers() as answers:
        try:
            return answers, RunPlan(make_plan(config), model=model, differs=differs)
        except UserError as error:
            return answers, RunPlan(problem=str(error), model=model, differs=differs)


def parse_searchpath(path: str) -> Path:
    """Return the folder that an entry of `hydra.searchpath` names."""
    if "://" in path and not path.startswith("file://"):
        raise UserError(
            f"hydra.searchpath={path}: a table reads its configs from folders only: file://..."
        )
    return Path(path.removeprefix("file://"))


def hash_sources(roots: Sequence[Path]) -> str:
    """Hash the config files below `roots` and the code that a plan is made from.

    Files that resolvers read, such as weights, are not included: their answers are compared.
    """
    digest = hashlib.sha256(f"{hydra_version} {omegaconf.__version__}".encode())
    paths = [path for root in roots for path in sorted(root.rglob("*.yaml"))]
    paths += [Path(__file__), *(Path(str(module.__file__)) for module in SOURCE_MODULES)]
    for path in paths:
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@contextmanager
def record_answers() -> Iterator[list[Answer]]:
    """Record the calls of the resolvers that read files, while the context is active."""
    answers: list[Answer] = []
    for name in FILE_RESOLVERS:
        _register_recorder(name, answers)
    try:
        yield answers
    finally:
        register_resolvers()


def _register_recorder(name: str, answers: list[Answer]) -> None:
    """Replace a resolver by one that also appends its calls to `answers`."""

    def call_and_record(*arguments: Any, _root_: DictConfig) -> Any:
        try:
            answer = FILE_RESOLVERS[name](*arguments, _root_=_root_)
        except UserError as error:
            answers.append([name, convert_to_plain(arguments), format_refusal(error)])
            raise
        answers.append([name, convert_to_plain(arguments), convert_to_plain(answer)])
        return answer

    OmegaConf.register_new_resolver(name, call_and_record, replace=True)


def format_refusal(error: UserError) -> str:
    """Return the record of an error, which differs from every answer of a resolver."""
    return f"refused: {error}"


def convert_to_plain(value: Any) -> Any:
    """Convert a config, or a tuple that holds configs, to plain values."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, tuple):
        return [convert_to_plain(item) for item in value]
    return value


class AnswerChecker:
    """Calls resolvers again, once for each distinct call, and compares their answers.

    Args:
        outputs: The value of `${outputs}` for the resolvers.

    Example:
        >>> checker = AnswerChecker("outputs")
        >>> checker.is_unchanged(["content_hash", ["a/model"], "0123456789abcdef"])
        False
    """

    def __init__(self, outputs: str) -> None:
        self.root = OmegaConf.create({"outputs": outputs})
        self.unchanged: dict[str, bool] = {}

    def is_unchanged(self, answer: Answer) -> bool:
        """Return whether the resolver still returns the recorded answer."""
        key = json.dumps(answer)
        if key not in self.unchanged:
            name, arguments, before = answer
            self.unchanged[key] = self._call_resolver(name, arguments) == before
        return self.unchanged[key]

    def _call_resolver(self, name: str, arguments: Sequence[Any]) -> Any:
        configs = []
        for value in arguments:
            configs.append(OmegaConf.create(value) if isinstance(value, dict) else value)
        try:
            return convert_to_plain(FILE_RESOLVERS[name](*configs, _root_=self.root))
        except UserError as error:
            return format_refusal(error)
