"""The pages of the documentation, with their code and their text."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        ROOT / "conf" / "README.md",
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("fp4dit/**/README.md"),
    ]
)
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code in a page.

    Attributes:
        page: The page's path in the repository.
        info: The words after the fence: the language, and `notest` for code that is not to be run.
        code: The code, without the indentation of the block.
    """

    page: str
    info: str
    code: str


def read_blocks(path: Path) -> list[Block]:
    """Return the blocks of code in a page."""
    blocks = []
    for indent, info, text in FENCE.findall(path.read_text()):
        code = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        blocks.append(Block(str(path.relative_to(ROOT)), info, code))
    return blocks


def remove_blocks(path: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return FENCE.sub("", path.read_text())


def find_code(path: Path) -> list[str]:
    """Return the blocks of code in a page, and the code within its sentences."""
    spans = re.findall(r"`([^`]+)`", remove_blocks(path))
    return [block.code for block in read_blocks(path)] + spans
