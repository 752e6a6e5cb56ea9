"""Plans of many rows at once, remembered: composing forty takes longer than a reader waits for a table.

What is remembered holds as long as every config file and the code that reads them are the same, and the resolvers that
look at other files still answer what they answered.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import omegaconf
from hydra import __version__ as hydra_version
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from fp4dit.errors import UserError
from fp4dit.store import fingerprint, remember, remembered
from pipelines.plan import Step, plan, planned
from pipelines.resolvers import CONF, LOOKING, register

Answer = list[Any]  # a resolver's name, what it was given, and what it answered


@dataclass(frozen=True)
class Plan:
    """The stages of a row, or why they cannot be planned yet: a file that they read is not here. And of which model."""

    steps: Mapping[str, Step] = field(default_factory=dict)
    problem: str = ""
    model: str = ""


def plans(rows: Sequence[Sequence[str]], outputs: str, searchpath: Sequence[str] = ()) -> list[Plan]:
    """One for each list of overrides of a run."""
    place, read = Path(outputs) / "store" / ".plans.json", state([CONF, *map(folder, searchpath)])
    before = remembered(place)
    known, fresh, again = before["plans"] if before.get("read") == read else {}, {}, Again(outputs)
    found = []
    every = 0.2 if sys.stderr.isatty() else 10.0
    for overrides in tqdm(rows, "plan", leave=False, mininterval=every, delay=every):
        key = fingerprint({"overrides": list(overrides)})
        if key in known and all(map(again.holds, known[key]["answers"])):
            its = known[key]
            steps = {name: planned(name, **given) for name, given in its["steps"].items()}
            found.append(Plan(steps, its["problem"], its["model"]))
            continue
        answers, one = composed(overrides, outputs)
        found.append(one)
        steps = {name: {"needs": step.needs, "identity": step.identity} for name, step in one.steps.items()}
        fresh[key] = {"answers": answers, "steps": steps, "problem": one.problem, "model": one.model}
    if fresh:
        remember(place, {"read": read, "plans": {**known, **fresh}})
    return found


def composed(overrides: Sequence[str], outputs: str) -> tuple[list[Answer], Plan]:
    config = compose("run", list(overrides))
    config.outputs = outputs
    model = OmegaConf.select(config, "model.path") or ""
    with listening() as answers:
        try:
            return answers, Plan(plan(config), model=model)
        except UserError as error:
            return answers, Plan(problem=str(error), model=model)


def folder(path: str) -> Path:
    """Of Hydra's search path."""
    if "://" in path and not path.startswith("file://"):
        raise UserError(f"hydra.searchpath: a table reads folders alone, file://..., not {path!r}")
    return Path(path.removeprefix("file://"))


def state(roots: Sequence[Path]) -> str:
    """Of all that a plan is read from, but the files that resolvers look at."""
    digest = hashlib.sha256(f"{hydra_version} {omegaconf.__version__}".encode())
    code = Path(__file__).parent
    read = [code / name for name in ("plan.py", "plans.py", "resolvers.py")]
    for path in [*(p for root in roots for p in sorted(root.rglob("*.yaml"))), *read]:
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@contextmanager
def listening() -> Iterator[list[Answer]]:
    """What the resolvers that look at files are asked meanwhile, and what they answer."""
    answers: list[Answer] = []

    def hear(name: str) -> None:
        def resolver(*given: Any, _root_: DictConfig) -> Any:
            try:
                answer = ask(name, given, _root_)
            except UserError as error:
                answers.append([name, plain(given), refused(error)])
                raise
            answers.append([name, plain(given), plain(answer)])
            return answer

        OmegaConf.register_new_resolver(name, resolver, replace=True)

    for name in LOOKING:
        hear(name)
    try:
        yield answers
    finally:
        register()


def ask(name: str, given: Sequence[Any], root: DictConfig) -> Any:
    resolver = LOOKING[name]
    return resolver(*given, **({"_root_": root} if "_root_" in signature(resolver).parameters else {}))


def refused(error: UserError) -> str:
    """In place of an answer, none of which begins like that."""
    return f"refused: {error}"


def plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return [plain(one) for one in value] if isinstance(value, tuple) else value


class Again:
    """Asks resolvers once more, each question once."""

    def __init__(self, outputs: str) -> None:
        self.root = OmegaConf.create({"outputs": outputs})
        self.asked: dict[str, bool] = {}

    def holds(self, answer: Answer) -> bool:
        key = json.dumps(answer)
        if key not in self.asked:
            name, given, before = answer
            try:
                now = ask(name, [OmegaConf.create(one) if isinstance(one, dict) else one for one in given], self.root)
                self.asked[key] = plain(now) == before
            except UserError as error:
                self.asked[key] = refused(error) == before
        return self.asked[key]
