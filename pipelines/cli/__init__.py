"""Command line: running a command, messages for its errors, dry runs, and their tables.

Start at `run_command`, which every command calls.
"""

from typing import TYPE_CHECKING

from fp4dit.utils.lazy import export_lazily

if TYPE_CHECKING:
    from pipelines.cli.dry_run import PrintDryRun
    from pipelines.cli.main import EmptySweepCheck, run_command

__all__ = ["EmptySweepCheck", "PrintDryRun", "run_command"]

__getattr__ = export_lazily(
    __name__, {"dry_run": ["PrintDryRun"], "main": ["EmptySweepCheck", "run_command"]}
)
