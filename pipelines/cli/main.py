"""The function that runs a command: it checks overrides, and explains errors in one message."""

import inspect
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fp4dit.utils.errors import UserError
from pipelines.cli.errors import explain_error
from pipelines.config.resolvers import list_options, register_resolvers
from pipelines.config.validation import check_text_for_secrets

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


def run_command(main: Callable[[], Any]) -> None:
    """Run a command, and explain its errors.

    If HYDRA_FULL_ERROR=1 is set in the environment, errors are shown with their traceback.

    Args:
        main: A function that `hydra.main` decorates.
    """
    register_resolvers()
    # joblib warns when it replaces workers whose memory has grown, as it does in each worker that
    # loads a model.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
    with exit_with_explanation(config=Path(inspect.getfile(inspect.unwrap(main))).stem):
        check_text_for_secrets(" ".join(sys.argv))
        check_group_values(sys.argv[1:])
        with sandbox_dry_run(sys.argv) as arguments:
            sys.argv = arguments
            main()


@contextmanager
def exit_with_explanation(config: str = "run") -> Iterator[None]:
    """Context manager: end the program with one message for an error that its user can mend.

    Args:
        config: The root config of the command, for messages about its keys.
    """
    asked = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints the error itself and exits
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        cause = stop.__context__ if isinstance(stop, SystemExit) else stop
        if not isinstance(cause, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore a second Ctrl-C
        print("stopped. Finished work is kept: the same command resumes it", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        message = explain_error(error, config)
        if asked == "1" or message is None:
            raise
        sys.exit(f"error: {message}\n(HYDRA_FULL_ERROR=1 shows where)")
    finally:
        os.environ["HYDRA_FULL_ERROR"] = asked  # a program may run two commands, one after another


@contextmanager
def sandbox_dry_run(arguments: list[str]) -> Iterator[list[str]]:
    """Change the arguments of a dry run so that it leaves no files and runs on this machine.

    Hydra creates its folders before the command starts, so they are put in a temporary folder. All
    jobs of a sweep run in this process, even if another launcher is asked for.
    """
    if "dry_run=true" not in [argument.lstrip("+").lower() for argument in arguments]:
        yield arguments
        return
    launcher = ("hydra/launcher=", "hydra.launcher.")
    changed = [item for item in arguments if not item.lstrip("+~").startswith(launcher)]
    with tempfile.TemporaryDirectory() as folder:
        yield [*changed, f"hydra.run.dir='{folder}'", f"hydra.sweep.dir='{folder}'"]


def check_group_values(overrides: Sequence[str]) -> None:
    """Raise a UserError if an override of a group is a number or null, not an option's name.

    Hydra's own error does not say which override is wrong.
    """
    texts = [text for text in overrides if re.match(r"[^-][^=]*=", text)]
    for override in OverridesParser.create().parse_overrides(texts):
        group, values = override.key_or_group, override.value()
        if isinstance(values, ChoiceSweep):
            values = values.list
        elif not isinstance(values, list):
            values = [values]
        if all(not isinstance(value, bool | int | float | dict | None) for value in values):
            continue
        if options := list_options(group):
            raise UserError(
                f"{override.input_line}: give {group} the name of an option, one of "
                f"{', '.join(options)}"
            )


class EmptySweepCheck(Callback):
    """Hydra callback that ends a sweep whose pattern matches nothing.

    Without it, a sweep of no jobs would look like a success.

    Example:
        In `conf/run.yaml`: `hydra.callbacks.empty_sweep: {_target_: pipelines.cli.EmptySweepCheck}`
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for override in parser.parse_overrides(list(config.hydra.overrides.task)):
            is_discrete = override.is_sweep_override() and override.is_discrete_sweep()
            if is_discrete and not list(override.sweep_string_iterator()):
                group = override.key_or_group
                options = list_options(group)
                suffix = f"; {group} has {', '.join(options)}" if options else ""
                # Hydra turns the exceptions of callbacks into warnings, except SystemExit.
                sys.exit(f"error: 0 jobs: {override.input_line} matches nothing{suffix}")
