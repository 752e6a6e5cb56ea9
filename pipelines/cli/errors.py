"""Messages for the errors of a command that its user can mend."""

import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import extract_tb
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp4dit.utils.errors import UserError
from fp4dit.utils.extras import explain_missing_package
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF, list_options, suggest_names
from pipelines.config.validation import get_parameter_types, select_value
from pipelines.runtime.oom import last_error_line

LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")

INSTALL_LAUNCHERS = "pip install 'fp4dit[launchers]'"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)

# A method's file outside of conf/ is composed under its own name with this prefix, so that it
# differs from the names of the presets.
STAGED_FILE = "file_"


class Explanation(NamedTuple):
    """The message for an error of another library, which is known by its class and its text.

    Args:
        types: The classes of the error.
        pattern: A regular expression that the text of the error contains.
        message: The message to show, in which `\\1` stands for the pattern's first group.
    """

    types: tuple[type[Exception], ...]
    pattern: str
    message: str


EXPLANATIONS = (
    Explanation(  # OmegaConf
        (HydraException, OmegaConfBaseException),
        r"Missing mandatory value: (\S+)",
        r"\1 is missing and has no default: give \1=...",
    ),
    Explanation(  # submitit
        (RuntimeError,),
        'Could not detect "srun"',
        "there is no SLURM here (its commands are sbatch and srun): run the command on a node of "
        "the cluster",
    ),
    Explanation(  # submitit
        (RuntimeError,),
        r"(?s)^Job (\S+) .*?with path (.+?)_result\.pkl\n"
        r"has not produced any output \(state: (.+?)\)",
        r"job \1 ended without a result (state: \3); its output is in \2_log.err and _log.out. "
        "Other jobs continue, and finished work is kept: the same command resumes it. If memory or "
        "time was too short, raise hydra.launcher.mem_gb or hydra.launcher.timeout_min",
    ),
    Explanation(  # torch
        (RuntimeError,),
        r"(?s)^(.+?) does not have a deterministic implementation",
        r"deterministic=on: \1 may give other bits each time on this device; "
        "deterministic=warn allows it",
    ),
)


def explain_error(error: Exception, config: str = "run") -> str | None:
    """Return a message for an error that a user can mend; None for one that only a developer can.

    Args:
        error: The error that ended a command.
        config: The name of the command's root config.
    """
    if isinstance(error, UserError):
        return str(error)
    if f"\n{UserError.__module__}.{UserError.__name__}: " in str(error):
        # The error of a process that Lightning spawned holds the traceback as text.
        return last_error_line(error)
    if isinstance(error, OSError) and (message := _explain_os_error(error)):
        return message
    if message := explain_missing_package(error):
        return message
    for types, pattern, message in EXPLANATIONS:
        match = re.search(pattern, str(error))
        if match and isinstance(error, types):
            return match.expand(message)
    if key := _find_key_of_list(error):
        return (
            f"a key before .{key} in an override holds a list, such as the empty list of rules of "
            "activation=none: leave the override out, or choose an option with rules, such as "
            "activation=int8_token"
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_config_error(error, config)
    return None


def _explain_os_error(error: OSError) -> str | None:
    if error.errno in NOT_WRITABLE:
        return (
            f"{error.filename or 'a file'}: {error.strerror}. Choose a writable folder with "
            "outputs=, or make this one writable"
        )
    if error.errno in DISK_FULL:
        place = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{place}. Finished work is kept: free some space and give the same "
            "command again."
        )
    return None


def _explain_config_error(error: Exception, config: str) -> str:
    text, place = str(error), ""
    if match := re.match(r"In '[^']+/([^'/]+)': (.*)", text, re.DOTALL):  # not in a root config
        place, text = _format_place(match[1]), match[2]
    if isinstance(error, MissingConfigException):
        place = place or _find_file_of_default(error)
        return place + _explain_missing_option(error.missing_cfg_file or "", error.options)
    if match := re.match(r"Could not override '(.+?)'", text):
        key = match[1].split("=")[0]
        return place + _explain_missing_group(key) if place else _explain_unknown_key(key, config)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: {error.message}"
    cause = error.__cause__
    if isinstance(cause, UserError):  # raised by a resolver
        return str(cause)
    if isinstance(cause, OmegaConfBaseException | ValueError):
        return f"{error}\n{cause}"
    return str(error)


def _explain_missing_option(file: str, options: Sequence[str] | None) -> str:
    group, _, name = file.rpartition("/")
    if group == "hydra/launcher" and name in LAUNCHERS:
        return f"{group}={name} is not installed. To install it: {INSTALL_LAUNCHERS}"
    options = options or list_options(group)
    if not options:
        return _explain_missing_group(group) if group else f"there is no config {name!r}"
    return f"{group}={name}: {group!r} has no option {name!r}; {suggest_names(name, options)}"


def _find_file_of_default(error: MissingConfigException) -> str:
    """Return the file whose list of defaults overrides a group by an option that does not exist.

    Hydra names the root config as the place of such an override.
    """
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    line = re.compile(rf"^\s*- override /?{group}: *{re.escape(name)}\s*(#.*)?$", re.MULTILINE)
    for folder in re.findall(r"path=file://(.+)", str(error)):
        for path in sorted(Path(folder).rglob("*.yaml")):
            if line.search(path.read_text()):
                return _format_place(path.stem)
    return ""


def _format_place(config: str) -> str:
    return f"{config.removeprefix(STAGED_FILE)}.yaml: "


def _explain_missing_group(group: str) -> str:
    """Explain that a file's list of defaults names a group that does not exist."""
    group = group.partition("@")[0]
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    name = group.rpartition("/")[2]
    if group != name and name in groups:  # without a slash, it is looked for beside the file
        return f"there is no group {group!r}; write /{name}, with a slash before it"
    return f"there is no group {group!r}; {suggest_names(group, groups)}"


def _explain_unknown_key(key: str, config: str) -> str:
    """Explain that a key does not exist, in the command's config or in that of a table's rows."""
    keys = [argument.lstrip("+~").split("=")[0] for argument in sys.argv]
    is_row_key = key not in keys  # an override of a table's row, whose choices are not known here
    default = composed = compose_config("run" if is_row_key else config, keep_hydra=True)
    if not is_row_key and (choices := list_group_choices(sys.argv[1:], default)):
        composed = compose_config(config, choices, keep_hydra=True)
    names = list_override_names(composed)
    if key not in names and _is_optional_argument(key, composed):
        return f"{key!r} is not in the configuration, but can be added: write +{key}="
    if key in list_override_names(default):
        return (
            f"{key!r} is not in this configuration, only in the default one: leave it out, or "
            "choose options that have it"
        )
    return f"{key!r} is not in the configuration; {suggest_names(key, names)}"


def list_group_choices(arguments: Sequence[str], config: DictConfig) -> list[str]:
    """Return the arguments that choose one option of a group, and where to look for options.

    Args:
        arguments: The arguments of a command.
        config: A config of the command, with Hydra's own in it.
    """
    keys, parser = ("hydra.searchpath", *config.hydra.runtime.choices), OverridesParser.create()
    choices = []
    for argument in arguments:
        is_choice = argument.partition("=")[0] in keys
        if is_choice and not parser.parse_override(argument).is_sweep_override():
            choices.append(argument)
    return choices


def _is_optional_argument(key: str, config: DictConfig) -> bool:
    """Return whether the code that a part of a config names takes this argument."""
    parent, _, name = key.rpartition(".")
    node = select_value(config, parent) if parent else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return target is not None and name != "return" and name in get_parameter_types(target)


def _find_key_of_list(error: BaseException | None) -> str | None:
    """Return the key that an override gives for an item of a list, where only a position can be."""
    if isinstance(error, HydraException):
        error = error.__cause__
    if not isinstance(error, TypeError | ValueError):
        return None
    frames = extract_tb(error.__traceback__)
    if not frames or "omegaconf" not in Path(frames[-1].filename).parts:
        return None
    for pattern in (r"Index '(.+?)' \(str\) is not an int", r"invalid literal for int.*: '(.+?)'"):
        if match := re.match(pattern, str(error)):
            return match[1]
    return None


def list_override_names(config: DictConfig) -> list[str]:
    """Return everything that can stand before `=` in an override of a root config.

    Args:
        config: The config, with Hydra's own in it.
    """
    groups = [str(group) for group in config.hydra.runtime.choices]
    names = [group for group in groups if not group.startswith("hydra/")]
    options = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return list(dict.fromkeys([*names, *list_config_paths(options)]))


def list_config_paths(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys of a config, except of those of the stages."""
    names = []
    for key in map(str, config):
        name = f"{prefix}{key}"
        names.append(name)
        if name == "stages" or OmegaConf.is_interpolation(config, key):
            continue
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            names += list_config_paths(config[key], f"{name}.")
    return names
