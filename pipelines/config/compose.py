"""Compose configs of `conf/` without Hydra's global state: in notebooks, threads and other apps.

Composing the files takes much longer than setting values in the result. The compositions of the
last choices of files are therefore kept, and made again when a file has changed.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pipelines.config.resolvers import CONF

# The path, the size and the time of the last change of each file that can be chosen.
FileStates = frozenset[tuple[str, int, int]]


def compose_config(
    name: str = "run", overrides: Sequence[str] = (), keep_hydra: bool = False
) -> DictConfig:
    """Compose a root config, as the command of its name does.

    `hydra.compose` does the same, but only between `initialize` and `clear` of one global object.

    Args:
        name: The name of the root config, such as `run` for `conf/run.yaml`.
        overrides: Overrides in Hydra's grammar, `hydra.searchpath=[...]` among them.
        keep_hydra: Keep Hydra's own config, in the node `hydra`.

    Raises:
        HydraException: if an override is not valid.

    Example:
        >>> compose_config("run", ["method=gptq", "rounding.damping=0.02"]).rounding.damping
        0.02
    """
    loader = _make_loader()
    parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
    folders = [CONF, *_find_searchpath(parsed)]
    if keep_hydra or not all(folder.is_dir() for folder in folders):
        return _load_configuration(name, overrides, keep_hydra)
    choices, values = [], []
    for override in parsed:
        (values if _sets_value(override, folders) else choices).append(override)
    loader.validate_sweep_overrides_legal(values, RunMode.RUN, from_shell=True)
    states = frozenset(state for folder in folders for state in _read_states(str(folder)))
    lines = tuple(str(override.input_line) for override in choices)
    config = copy.deepcopy(_compose_files(name, lines, states))
    loader._apply_overrides_to_config(values, config)
    return config


def _make_loader() -> ConfigLoaderImpl:
    return ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONF)))


def _find_searchpath(overrides: Sequence[Override]) -> list[Path]:
    """Return the folders that Hydra searches besides `conf/`."""
    values = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
    paths = [path for value in values if isinstance(value, list) for path in value]
    return [Path(str(path).removeprefix("file://")).resolve() for path in paths]


def _sets_value(override: Override, folders: Sequence[Path]) -> bool:
    """Return whether an override sets a value in the config, and chooses no file."""
    key = override.key_or_group
    is_group = any((folder / key).is_dir() for folder in folders)
    return not is_group and override.package is None and not key.startswith("hydra")


def _read_states(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield the states of the YAML files below a folder."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _read_states(entry.path)
        elif entry.name.endswith((".yaml", ".yml")):
            state = entry.stat()
            yield entry.path, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=128)
def _compose_files(name: str, choices: tuple[str, ...], states: FileStates) -> DictConfig:
    """Compose a root config with choices of files, while the files have these states."""
    return _load_configuration(name, choices)


def _load_configuration(
    name: str, overrides: Sequence[str], keep_hydra: bool = False
) -> DictConfig:
    config = _make_loader().load_configuration(name, list(overrides), RunMode.RUN)
    if not keep_hydra:
        OmegaConf.set_struct(config, False)
        OmegaConf.set_readonly(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
    return config
