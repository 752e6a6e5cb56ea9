"""Compose configs of `conf/` without Hydra's global state: in notebooks, threads and other apps."""

from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pipelines.config.resolvers import CONF


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
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONF)))
    config = loader.load_configuration(name, list(overrides), RunMode.RUN)
    if not keep_hydra:
        OmegaConf.set_struct(config, False)
        OmegaConf.set_readonly(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
    return config
