"""The commands that the documentation shows: they exist, and their options too.

Commands of Hydra are parsed and their configs composed, and commands of `fp4dit` on a model are
parsed by the parser of the command.
"""

import importlib.util
import re
import shlex
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override

from pipelines.cli import model_commands
from pipelines.cli.program import MODEL_COMMANDS
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF, list_options, register_resolvers
from pipelines.store import ACTIONS
from tests.conftest import ROOT
from tests.helpers.pages import FENCE, PAGES, find_code

SHOWN = [*PAGES, *CONF.rglob("*.yaml")]
RECIPES = ["make", "--always-make", "--dry-run", "demo", "table", "TABLE=demo"]
MAKE = r"(?:^ *|&& )make ([a-z-]+)"
PROGRAM = r"(?:^ *|`)fp4dit ([a-z]\w*)"
MODULE = r"python -m ((?:pipelines|benchmarks)\.\w+)"
ARGUMENTS = r"((?:\\\n|(?!python -m)[^`\n#;&|])*)"  # up to the end of the line, or of the code
OVERRIDE = re.compile(r"[+~]*[\w./@]+=")


class Command(NamedTuple):
    """A command of ours that a page shows.

    Attributes:
        module: The module that `python -m` runs.
        overrides: Its arguments that are overrides.
    """

    module: str
    overrides: tuple[str, ...]


def find_commands(text: str) -> list[Command]:
    """Return the commands of ours in a text, those of the model commands of `fp4dit` apart.

    A command ends at the end of its line, or of the code that it is a part of.
    """
    matches = re.findall(MODULE + ARGUMENTS, text)
    for name, arguments in re.findall(PROGRAM + ARGUMENTS, text, re.MULTILINE):
        if name not in MODEL_COMMANDS:
            matches.append((f"pipelines.{name}", arguments))
    return [
        Command(module, tuple(filter(OVERRIDE.match, shlex.split(arguments))))
        for module, arguments in matches
    ]


@pytest.fixture(scope="module")
def commands() -> list[Command]:
    """The commands that the documentation, the configs and the Makefile show."""
    make = subprocess.run(RECIPES, cwd=ROOT, capture_output=True, text=True, check=True)
    texts = [make.stdout, *(path.read_text() for path in SHOWN)]
    return list(dict.fromkeys(command for text in texts for command in find_commands(text)))


@pytest.fixture(scope="module")
def new_options(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of conf/ that the guides show how to add."""
    folder = tmp_path_factory.mktemp("conf")
    for path in PAGES:
        for name, text in find_new_options(path):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    return folder


def find_new_options(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each file of conf/ that a page shows and that is not there.

    The name stands in the first line of the block of code, or in the text before it.
    """
    end = 0
    for fence in FENCE.finditer(page.read_text()):
        before, end = fence.string[end : fence.start()], fence.end()
        names = re.findall(r"\bconf/(\w+/\w+\.yaml)", before + fence[3].partition("\n")[0])
        if fence[2] == "yaml" and names and not (CONF / names[-1]).exists():
            yield names[-1], fence[3]


def compose(name: str, overrides: Sequence[str], new_options: Path) -> None:
    """Compose a config, which may use new options."""
    compose_config(name, [*overrides, f"hydra.searchpath=[file://{new_options}]"])


def parse(command: Command) -> list[Override]:
    """Parse overrides. Hydra wants quotes around one that is a part of another one's value."""
    return OverridesParser.create().parse_overrides(list(command.overrides))


def test_shown_commands_are_modules(commands: list[Command]):
    assert len(commands) > 60
    modules = {command.module for command in commands}
    unknown = {module for module in modules if importlib.util.find_spec(module) is None}
    assert unknown <= {"pipelines.NAME"}  # stands for any command


def test_shown_commands_can_be_parsed(commands: list[Command]):
    assert sum(len(parse(command)) for command in commands) > 150


def test_shown_commands_name_options_that_exist(commands: list[Command], new_options: Path):
    unknown = set()
    for override in (override for command in commands for override in parse(command)):
        is_hydras = override.key_or_group.startswith("hydra/")
        options = [] if is_hydras else list_all_options(override.key_or_group, new_options)
        for name in list_values(override):
            if options and str(name) not in options and "glob" not in str(override.input_line):
                unknown.add(f"{override.key_or_group}={name}")
    assert not unknown


def list_all_options(group: str, new_options: Path) -> list[str]:
    """Return the names of a group's options, with those that the guides add."""
    return list_options(group) + [path.stem for path in (new_options / group).glob("*.yaml")]


def list_values(override: Override) -> list:
    """Return the value of an override, or its values if there are several."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        value = value.list
    return value if isinstance(value, list) else [value]


def test_shown_commands_compose(commands: list[Command], new_options: Path):
    """Compose each config that sets a value. The test above checks options of groups."""
    register_resolvers()
    composed: dict[str, list[set[str]]] = {}
    for command in sorted(commands, key=lambda command: -len(command.overrides)):
        name = command.module.removeprefix("pipelines.")
        overrides = list(select_for_one_job(command))
        is_part = any(set(overrides) <= other for other in composed.get(name, []))
        if not is_part and any(not list_options(text.partition("=")[0]) for text in overrides):
            compose(name, overrides, new_options)
            composed.setdefault(name, []).append(set(overrides))


def select_for_one_job(command: Command) -> Iterator[str]:
    """Yield overrides for the first job of a sweep, without Hydra's own."""
    for override in parse(command):
        values, text = override.value(), str(override.input_line)
        if isinstance(values, ChoiceSweep):
            yield f"{override.get_key_element()}={values.list[0]}"
        elif not text.startswith("hydra") and not override.is_sweep_override():
            yield text


def test_shown_actions_on_the_store_exist():
    code = "\n".join(text for path in PAGES for text in find_code(path))
    actions = set(re.findall(r"(?:pipelines\.|fp4dit )store (\w+)", code))
    assert {"ls", "explain", "gc"} <= actions <= set(ACTIONS)


class ParsedError(Exception):
    """Carries the arguments of a command that was parsed and does not run."""


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_shown_commands_on_a_model_are_accepted(
    name: str, new_options: Path, monkeypatch: pytest.MonkeyPatch
):
    parse_intermixed = ArgumentParser.parse_intermixed_args

    def parse_and_stop(parser: ArgumentParser, arguments: list[str]) -> None:
        raise ParsedError(parse_intermixed(parser, arguments))

    monkeypatch.setattr(ArgumentParser, "parse_intermixed_args", parse_and_stop)
    pattern = re.compile(PROGRAM.replace(r"([a-z]\w*)", rf"{name}\b") + ARGUMENTS, re.MULTILINE)
    shown = {text for path in PAGES for text in pattern.findall(path.read_text())}
    for arguments in filter(None, map(shlex.split, shown)):
        try:
            getattr(model_commands, name)(arguments)
        except ParsedError as parsed:
            check_model_command(parsed.args[0], new_options)


def check_model_command(options: Namespace, new_options: Path) -> None:
    """Check that the methods of a command exist, and that each accepts the overrides."""
    only = getattr(options, "method", None)  # `doctor` has none
    words = getattr(options, "methods", None) or list(filter(None, [only]))
    overrides = [word for word in words if "=" in word]  # `targets` has both kinds in one list
    for method in words:
        if method in overrides:
            continue
        if method in list_all_options("method", new_options):
            compose("run", [f"method={method}", *options.overrides, *overrides], new_options)
        else:
            assert method.endswith(".yaml") or method.isupper()  # a file, or any method


def test_shown_targets_of_make_exist(new_options: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    tables = list_all_options("table", new_options)
    for path in PAGES:
        for code in find_code(path):
            for target, arguments in re.findall(MAKE + ARGUMENTS, code, re.MULTILINE):
                assert target in targets, path
                table = re.search(r"TABLE=(\w+)", arguments)
                assert table is None or table[1] in tables, path
