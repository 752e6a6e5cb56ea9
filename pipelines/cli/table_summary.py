"""The end of `make demo`: a table on one screen, what it says, and what to do next."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from fp4dit.tables.render import TERMINAL_WIDTH, render_terminal
from fp4dit.tables.sentences import summarize_table
from fp4dit.tables.table import Table
from fp4dit.utils.formatting import align_columns

# What to try next: the arguments of `fp4dit`, and what they do.
NEXT_STEPS = (
    ("inspect pixart_alpha --method nvfp4_4over6", "what a method does to a model, layer by layer"),
    ("run method=gptq weight=nvfp4", "a method of your own choice on the demo's model"),
    (
        "quantize /a/pipeline --method fp4dit --prompts prompts.txt --out /a/new/folder",
        "your own pipeline",
    ),
)


def format_summary(
    table: Table, name: str, outputs: Path, missing: Sequence[str], bold: bool
) -> Iterator[str]:
    """Yield paragraphs: the table, sentences about it, where its files are, and what to try next.

    Args:
        table: The table.
        name: The name of the table, which its files have.
        outputs: The folder of all results.
        missing: Names of the rows without a result.
        bold: Print the best numbers in bold.
    """
    yield render_terminal(table, bold, brief=True)
    sentences = [*describe_missing_rows(missing, name), *summarize_table(table)]
    yield "".join(f"{textwrap.fill(sentence, TERMINAL_WIDTH)}\n" for sentence in sentences)
    files = list_files(name, outputs)
    yield "".join(f"{line}\n" for line in align_columns(files)) if files else ""
    program = find_program()
    steps = [(f"  {program} {arguments}", purpose) for arguments, purpose in NEXT_STEPS]
    yield "To try next:\n" + "\n".join(align_columns(steps))


def describe_missing_rows(missing: Sequence[str], name: str) -> Iterator[str]:
    """Yield a sentence about the rows without a result, if there are any."""
    if missing:
        yield (
            f"Without a result: {'; '.join(missing)}. If a job failed, its error is above; "
            f"`python -m pipelines.store explain {name}` says what is missing."
        )


def list_files(name: str, outputs: Path) -> list[tuple[str, str]]:
    """Return what the files of a table are, and where, as far as they exist."""
    places = {
        "picture": outputs / "tables" / f"{name}.png",
        "report": outputs / "reports" / f"{name}.html",
        "numbers": outputs / "tables" / f"{name}.csv",
    }
    return [(title, str(path)) for title, path in places.items() if path.is_file()]


def find_program() -> str:
    """Return how a shell in this folder starts `fp4dit`."""
    program = Path(sys.executable).parent / "fp4dit"
    if shutil.which("fp4dit") or not program.is_file():
        return "fp4dit"
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)
