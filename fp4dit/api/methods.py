"""List the presets of `conf/method`. The module imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fp4dit.utils.formatting import align_columns
from pipelines.config.resolvers import CONF, list_options


@dataclass(frozen=True)
class MethodInfo:
    """A preset, which `fp4dit.quantize` knows by its name.

    Attributes:
        name: Name of the preset.
        description: What it does, in a sentence or two.
        path: Its file.
        differs: How it differs from its authors' code, in sentences; empty if it does not, or if
            there is no such code.

    Example:
        >>> fp4dit.methods()["gptq"].description
        'GPTQ (arXiv:2210.17323): INT4 in groups of 128, 16-bit activations.'
    """

    name: str
    description: str
    path: Path
    differs: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.description}"]
        if self.differs:
            lines.append("It differs from its authors' code:")
            lines += [f"- {sentence}" for sentence in self.differs]
        return "\n".join(lines)


class MethodList(dict[str, MethodInfo]):
    """The presets by name. It prints as a table, and a notebook shows it as one."""

    def __str__(self) -> str:
        return "\n".join(align_columns(list(self._iter_cells())))

    __repr__ = __str__

    def _iter_cells(self) -> Iterator[tuple[str, str]]:
        for info in self.values():
            yield info.name, info.description

    def _repr_html_(self) -> str:
        rows = ""
        for name, description in self._iter_cells():
            rows += f"<tr><td><code>{escape(name)}</code></td><td>{escape(description)}</td></tr>"
        return f"<table>{rows}</table>"


def methods() -> MethodList:
    """Return the presets that `fp4dit.quantize` knows, with a line about each.

    Example:
        >>> print(fp4dit.methods())
    """
    presets = MethodList()
    for name in list_options("method"):
        path = CONF / "method" / f"{name}.yaml"
        config: Any = OmegaConf.load(path)
        differs = tuple(config.get("differs", ()))
        presets[name] = MethodInfo(name, read_description(path), path, differs)
    return presets


def read_description(path: Path) -> str:
    """Return the comment at the head of a config, after the line `# @package`."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
