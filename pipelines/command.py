"""What our commands have in common: a mistake gets one clear message and an exit code, not a traceback."""

import errno
import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fp4dit.errors import UserError
from pipelines.ahead import untouched
from pipelines.resolvers import CONF, nearest, options, register
from pipelines.secrets import check_text
from pipelines.shortage import spawned

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
NO_NAME = ("Config group override must be", "argument of type 'int' is not iterable")  # Hydra's, of group=1, group=[1]
LEFT_OUT = re.compile(r"Missing mandatory value: (\S+)")  # OmegaConf's
NO_POSITION = re.compile(r"Index '(.+?)' \(str\) is not an int|invalid literal for int\(\) with base 10: '(.+?)'")
LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")
INSTALL = "pip install -c constraints.txt -e"
FULL = (errno.ENOSPC, errno.EDQUOT)
LOST = re.compile(r"Job (\S+) .*?with path (.+?)_result\.pkl\nhas not produced any output \(state: (.+?)\)", re.DOTALL)
DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)


def command(main: Callable[[], Any]) -> Callable[[], None]:
    """A hydra.main that explains errors. With HYDRA_FULL_ERROR=1 in the environment they are shown in full."""

    def run() -> None:
        register()
        # joblib's, of workers that it replaces when they have grown, as those do that have loaded a model.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
        in_full = os.environ.get("HYDRA_FULL_ERROR") == "1"
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints the error itself and exits
        try:
            check_text(" ".join(sys.argv))
            check_groups(sys.argv[1:])
            with untouched(sys.argv) as sys.argv:
                main()
        except (KeyboardInterrupt, SystemExit) as stop:
            if not isinstance(stop.__context__ if isinstance(stop, SystemExit) else stop, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed twice is no other wish
            print("stopped. What was finished is kept: the same command goes on from there", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            message = explain(error, Path(inspect.getfile(inspect.unwrap(main))).stem)
            if in_full or message is None:
                raise
            sys.exit(f"error: {message}\n(HYDRA_FULL_ERROR=1 shows where)")

    return run


def check_groups(overrides: Sequence[str]) -> None:
    """Raises UserError for a number or the like where an option of a group is to be named: Hydra does not say where."""
    given = [one for one in overrides if re.match(r"[^-][^=]*=", one)]
    for override in OverridesParser.create().parse_overrides(given):
        name, value = override.key_or_group, override.value()
        values = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
        unnamed = any(isinstance(one, bool | int | float | dict | None) for one in values)
        if unnamed and (there := options(name)):
            raise UserError(f"{override.input_line}: after {name}= comes a name, one of {', '.join(there)}")


def explain(error: Exception, config: str = "run") -> str | None:
    """One message for what the user can mend; None for what only a developer can. `config` is the command's own."""
    if isinstance(error, UserError):
        return str(error)
    if "\nfp4dit.errors.UserError: " in str(error):  # of a process that Lightning spawned
        return spawned(error)
    if isinstance(error, OSError) and error.errno in DENIED:
        return (
            f"{error.filename or 'a file'}: {error.strerror}. Choose a folder that you may write to with outputs=, or "
            "have this one changed"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}. What was finished is kept: free some space and give the same command again."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and name in LAUNCHERS:
            return f"{group}={name} is not installed. To get it: {INSTALL} '.[launchers]'"
        return f"{group}={name}: {group!r} has no option {name!r}; {nearest(name, options(group))}"
    if isinstance(error, HydraException) and (found := re.match(r"Could not override '(.+?)'", str(error))):
        name = found[1].split("=")[0]
        own = name in [given.lstrip("+~").split("=")[0] for given in sys.argv]
        known = names(config if own else "run")  # whose rows a table composes
        if name in known:
            return f"{name!r} is not in this configuration, only in the default: leave it out, or choose what has it"
        return f"{name!r} is not in the configuration; {nearest(name, known)}"
    if isinstance(error, ValueError | TypeError) and str(error).startswith(NO_NAME):
        return f"{error}: after group= comes a name, one of those that --help shows"
    if part := without_position(error):
        return (
            f"what stands before .{part} in an override is a list of rules: name the position too, as in "
            "activation.0.quantizer, or leave the override out where the list is empty, as that of activation=none is"
        )
    if isinstance(error, RuntimeError) and 'Could not detect "srun"' in str(error):  # submitit's
        return "there is no SLURM here, whose commands are sbatch and srun: give the command on a node of the cluster"
    if isinstance(error, RuntimeError) and (found := LOST.match(str(error))):  # submitit's too
        job, logs, state = found.groups()
        return (
            f"job {job} ended without a result (state: {state}); what it said is in {logs}_log.err and _log.out. The "
            "jobs that run go on, and what was finished is kept: the same command goes on from there. If its memory or "
            "time was too short, raise hydra.launcher.mem_gb or hydra.launcher.timeout_min"
        )
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):  # torch's
        operation = str(error).partition(" does not have")[0]
        return f"deterministic=on: {operation} may give other bits each time on this device; warn allows it"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: {error.message}"
    if isinstance(error, HydraException | OmegaConfBaseException) and (found := LEFT_OUT.search(str(error))):
        return f"{found[1]} is left out, and has no default: give {found[1]}=..."
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        if isinstance(cause, UserError):  # of a resolver
            return str(cause)
        return str(error) + (f"\n{cause}" if isinstance(cause, OmegaConfBaseException | ValueError) else "")
    return None


def without_position(error: BaseException | None) -> str | None:
    """What an override names of a list, for lack of a position. Hydra has such an error of OmegaConf's as its cause."""
    if isinstance(error, HydraException):
        return without_position(error.__cause__)
    found = NO_POSITION.match(str(error)) if isinstance(error, TypeError | ValueError) and of_omegaconf(error) else None
    return found and (found[1] or found[2])


def of_omegaconf(error: BaseException) -> bool:
    """Whether it is raised there: others too may be given what is no number."""
    frames = extract_tb(error.__traceback__)
    return bool(frames) and "omegaconf" in Path(frames[-1].filename).parts


def names(command: str) -> list[str]:
    """Everything that can stand before `=` in an override of this command, whose config has its name."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(command, return_hydra_config=True)
    groups = [str(group) for group in config.hydra.runtime.choices]
    with open_dict(config):
        del config["hydra"]
    return list(dict.fromkeys([*(group for group in groups if not group.startswith("hydra/")), *paths(config)]))


def paths(config: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in map(str, config):
        name = f"{prefix}{key}"
        found.append(name)
        plain = not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key)
        if name != "stages" and plain and OmegaConf.is_dict(config[key]):
            found += paths(config[key], f"{name}.")
    return found


class RefuseEmptySweep(Callback):
    """A pattern that matches nothing would otherwise launch 0 jobs and look like success."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for override in parser.parse_overrides(list(config.hydra.overrides.task)):
            discrete = override.is_sweep_override() and override.is_discrete_sweep()
            if discrete and not list(override.sweep_string_iterator()):
                group = override.key_or_group
                there = f"; {group} has {', '.join(options(group))}" if options(group) else ""
                # Hydra turns a callback's exceptions into warnings, but not this one.
                sys.exit(f"error: 0 jobs: {override.input_line} matches nothing{there}")
