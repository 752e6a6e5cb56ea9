"""Find the file of `conf/model` that fits a pipeline or a model by its class."""

from functools import cache
from typing import Any

import yaml

from pipelines.config.resolvers import CONF, list_options

GENERIC = "generic"  # the option for any pipeline whose transformer has a list of blocks


def find_model_option(class_name: str) -> str:
    """Return the option of the group `model` for a class of diffusers.

    Args:
        class_name: Name of a pipeline or of a transformer, such as `PixArtSigmaPipeline`.

    Returns:
        The option whose file lists the class under `used_for`, or `generic`.

    Example:
        >>> find_model_option("PixArtSigmaPipeline"), find_model_option("FluxPipeline")
        ('pixart_sigma', 'generic')
    """
    return _read_classes().get(class_name, GENERIC)


@cache
def _read_classes() -> dict[str, str]:
    options = {}
    for option in list_options("model"):
        config: Any = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())
        for class_name in config.get("used_for", ()):
            options[class_name] = option
    return options
