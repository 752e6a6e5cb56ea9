"""Find the file of `conf/model` that fits a pipeline or a model by its class."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from fp4dit.models.hub_files import find_config
from fp4dit.utils.files import read_json
from pipelines.config.resolvers import CONF, list_options

TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"

GENERIC = "generic"  # the option for any pipeline whose transformer has a list of blocks


def find_model_option(class_name: str) -> str:
    """Return the option of the group `model` for a class of diffusers.

    Args:
        class_name: Name of a pipeline or of a transformer, such as `PixArtSigmaPipeline`.

    Returns:
        The option whose file lists the class under `used_for`, or `generic`.

    Example:
        >>> find_model_option("FluxPipeline"), find_model_option("MochiPipeline")
        ('flux1_dev', 'generic')
    """
    for option, config in _read_options().items():
        if class_name in config.get("used_for", ()):
            return option
    return GENERIC


def find_lower_tokens(
    class_name: str, token_limit: int | None, overrides: Sequence[str]
) -> int | None:
    """Return the number of tokens of prompts, if a tokenizer takes fewer than the option has.

    The option of a class has the number of the published models. A small model of the same class,
    such as those that this project ships, was trained with fewer, and its tokenizer says so.

    Args:
        class_name: Name of the pipeline's class, which chooses the option of `model`.
        token_limit: `model_max_length` of the tokenizer, if there is one.
        overrides: Overrides of the user. If one of them chooses the model or the number of tokens,
            the result is None.

    Example:
        >>> find_lower_tokens("PixArtSigmaPipeline", 20, [])
        20
    """
    keys = {text.lstrip("+~").partition("=")[0] for text in overrides}
    tokens = _read_options()[find_model_option(class_name)]["model"].get("tokens")
    if keys & {"model", "model.tokens"} or not tokens or not token_limit or token_limit >= tokens:
        return None
    return token_limit


def read_token_limit(path: str) -> int | None:
    """Return `model_max_length` of a pipeline's tokenizer, if its config is on this machine.

    Args:
        path: The folder or the hub id of the pipeline.
    """
    file = find_config(path, TOKENIZER_CONFIG)
    return read_json(file).get("model_max_length") if file else None


@cache
def _read_options() -> Mapping[str, Any]:
    options = {}
    for option in list_options("model"):
        options[option] = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())
    return options
