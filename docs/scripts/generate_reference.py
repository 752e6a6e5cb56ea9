"""MkDocs hook: fill in the parts of the reference that are made from the code and from conf/.

A page has a line such as `<!-- generate: metrics -->` where such a part belongs.
"""

import io
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import yaml

from pipelines.cli import model_commands
from pipelines.cli.program import EXPERIMENT_COMMANDS, MODEL_COMMANDS, print_help
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF, list_options, register_resolvers
from pipelines.results.columns import load_catalog

MAKEFILE = Path(__file__).parents[2] / "Makefile"
MARKER = re.compile(r"^<!-- generate: (\w+) -->$", re.MULTILINE)
DEFAULT = re.compile(r"^  - (?:override )?([\w/@.]+): (\S+)(?: +# (.*))?$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the markers of a page. MkDocs calls this function for every page."""
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


def generate_config_groups() -> str:
    """Return a section for each config group, with a table of its options."""
    defaults = read_defaults()
    sections = []
    for group in sort_groups(defaults):
        default, purpose = defaults.get(group, ("", ""))
        rows = []
        for option in list_options(group):
            mark = " (default)" if option == default else ""
            rows.append((f"`{option}`{mark}", describe_option(CONF / group / f"{option}.yaml")))
        if rows:
            intro = f"{capitalize(purpose)}.\n\n" if purpose else ""
            sections.append(f"### {group}\n\n{intro}{render_table(('option', ''), rows)}")
    return "\n\n".join(sections)


def sort_groups(defaults: Collection[str]) -> list[str]:
    """Return the names of all groups, first those that a command has by default, in that order."""
    groups = list_groups()
    ordered = [group for group in defaults if group in groups]
    return ordered + [group for group in groups if group not in ordered]


def read_defaults() -> dict[str, tuple[str, str]]:
    """Return the default and the comment of each group that a command chooses, `run` before all."""
    defaults: dict[str, tuple[str, str]] = {}
    for path in [CONF / "run.yaml", *sorted(CONF.glob("*.yaml"))]:
        for group, option, purpose in DEFAULT.findall(path.read_text()):
            if not defaults.get(group, ("", ""))[1]:
                defaults[group] = option, purpose
    return defaults


def list_groups() -> list[str]:
    """Return the names of all groups of conf/ that have options, without those of help texts."""
    folders = sorted({path.parent for path in CONF.rglob("*/*.yaml")})
    names = [folder.relative_to(CONF).as_posix() for folder in folders]
    return [name for name in names if name != "hydra/help"]


def describe_option(path: Path) -> str:
    """Return what an option is: the comment of its file, the question of a table, or its values."""
    if comment := read_comment(path):
        return comment
    values: Mapping = yaml.safe_load(path.read_text())
    if "question" in values:
        return values["question"]
    return ", ".join(f"`{name}: {value}`" for name, value in values.items())


def read_comment(path: Path) -> str:
    """Return the first sentence of the comment at the head of a file."""
    lines = []
    for line in path.read_text().splitlines():
        if line.startswith("# @package "):
            continue
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# ").strip())
    return re.split(r"(?<=\.) (?=[A-Z`])", " ".join(lines))[0]


def capitalize(sentence: str) -> str:
    """Return a sentence with its first letter in upper case; `str.capitalize` lowers the others."""
    return sentence[:1].upper() + sentence[1:]


def render_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(escape(cell) for cell in line)} |" for line in lines)


def escape(cell: str) -> str:
    """Return the text of a cell with the characters escaped that end a cell or begin a tag."""
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def generate_commands() -> str:
    """Return a section for each command, with its help text."""
    register_resolvers()
    texts = {"fp4dit": capture_output(print_help, [])}
    for name in MODEL_COMMANDS:
        texts[f"fp4dit {name}"] = capture_output(getattr(model_commands, name), ["--help"])
    for name in (*EXPERIMENT_COMMANDS, "inspect"):
        help_page = compose_config(name, keep_hydra=True).hydra.help.template
        texts[f"python -m pipelines.{name}"] = help_page
    sections = [f"## {name}\n\n```text\n{text.rstrip()}\n```" for name, text in texts.items()]
    return "\n\n".join(sections)


def capture_output(command: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> str:
    """Return what a command prints on a terminal of 100 columns."""
    output = io.StringIO()
    with patch.dict(os.environ, COLUMNS="100"), redirect_stdout(output), suppress(SystemExit):
        command(arguments)
    return output.getvalue()


def generate_make() -> str:
    """Return a table of the targets of make, which the Makefile lists in its first comment."""
    rows = re.findall(r"^# (make \S+(?: [A-Z]+=\w+)?) +(.+)$", MAKEFILE.read_text(), re.MULTILINE)
    return render_table(("command", ""), [(f"`{command}`", text) for command, text in rows])


def generate_metrics() -> str:
    """Return a table of all metrics."""
    catalog = load_catalog()
    rows = []
    for name in list_options("metrics"):
        if name in catalog.metrics:
            column = catalog.find_column(name)
            scope = "each image" if column.per_image else "the set"
            better = column.better or ""
            comment = read_comment(CONF / "metrics" / f"{name}.yaml")
            rows.append((f"`{name}`", column.title, better, scope, comment))
    presets = [
        (f"`{name}`", "", "", "", read_comment(CONF / "metrics" / f"{name}.yaml"))
        for name in list_options("metrics")
        if name not in catalog.metrics
    ]
    heading = ("name", "column", "better", "value of", "")
    return (
        f"{render_table(heading, rows)}\n\nThe presets are\n\n"
        f"{render_table(('name', ''), [(row[0], row[-1]) for row in presets])}"
    )


def generate_columns() -> str:
    """Return a table of the columns that are not metrics."""
    columns: Mapping[str, Mapping] = yaml.safe_load((CONF / "table/_base.yaml").read_text())
    rows = []
    for name, fields in columns["columns"].items():
        rows.append((f"`{name}`", str(fields["title"]), str(fields.get("better", ""))))
    return render_table(("name", "column", "better"), rows)


GENERATORS: Mapping[str, Callable[[], str]] = {
    "config_groups": generate_config_groups,
    "commands": generate_commands,
    "make": generate_make,
    "metrics": generate_metrics,
    "columns": generate_columns,
}
