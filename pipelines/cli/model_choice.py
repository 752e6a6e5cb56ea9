"""The model and the method that the arguments of a command choose."""

import atexit
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fp4dit.models.hub_files import INDEX, read_config
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import CONF, HUB_ID, list_options, suggest_names


def find_model_overrides(model: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the overrides that choose a model.

    Args:
        model: A name of conf/model, the folder of a pipeline, or a hub id.
        overrides: The user's overrides, which come after those that are returned.

    Raises:
        UserError: if there is no such model, or the hub cannot be asked for it.
    """
    names = list_options("model")
    for name in names:
        text = (CONF / "model" / f"{name}.yaml").read_text()
        if model in (name, yaml.safe_load(text)["model"]["path"]):
            return [f"model={name}"]
    if not (Path(model).is_dir() or HUB_ID.fullmatch(model)):
        raise UserError(
            f"{model}: this is no folder, no hub id (owner/name) and no name of conf/model; "
            f"{suggest_names(model, names)}"
        )
    from fp4dit.api.families import find_lower_tokens, find_model_option, read_token_limit

    class_name = read_config(model, INDEX).get("_class_name", "")
    path = model.replace("\\", "\\\\").replace("'", "\\'")
    texts = [f"model={find_model_option(class_name)}", f"model.path='{path}'"]
    if tokens := find_lower_tokens(class_name, read_token_limit(model), overrides):
        texts.append(f"model.tokens={tokens}")
    return texts


def choose_method(method: str) -> list[str]:
    """Return the overrides that choose a method by its name or its file."""
    if not method.endswith((".yaml", ".yml")):
        return [f"method={method}"]
    # Imported here because it takes seconds. The file is copied to a folder for this program.
    from fp4dit.api.presets import stage_method_file

    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(stage_method_file(method))


def find_source(method: str, overrides: Sequence[str], has_prompts: bool = True) -> Any:
    """Return the source of the pipeline, and check the method and its options.

    Args:
        method: Name or file of a method.
        overrides: Overrides of its config, with those that choose the model.
        has_prompts: Whether there are prompts to calibrate on.

    Raises:
        UserError: if there is no such method, an override is wrong, or prompts are missing.
    """
    from fp4dit.api.presets import compose_preset
    from fp4dit.api.quantize import check_quantizes

    preset = compose_preset(method, overrides)
    check_quantizes(preset)
    if preset.data_need and not has_prompts:
        raise UserError(
            f"{method} needs prompts, because {preset.data_need}: give --prompts FILE; 32 to 128 "
            "prompts are sensible"
        )
    return preset.source


def find_shared_source(
    methods: Sequence[str], model: Sequence[str], overrides: Sequence[str]
) -> Any:
    """Return the source of the pipeline on which methods are compared, and check each method.

    Args:
        methods: Names or files of the methods.
        model: Overrides that choose the model.
        overrides: The user's overrides, which all methods get.

    Raises:
        UserError: as `find_source` does. It says which method refuses the overrides.
    """
    from fp4dit.api.compare import compose_with_shared_overrides

    def find(method: str, texts: Sequence[str]) -> Any:
        return find_source(method, [*model, *texts])

    sources = []
    for method in methods:
        sources.append(compose_with_shared_overrides(method, overrides, partial(find, method)))
    return sources[0]


def load_pipeline(source: Any) -> Any:
    """Load a pipeline, from safetensors only, in the dtype of its source."""
    from fp4dit.utils.hub import hide_loading_bars

    hide_loading_bars()
    return source.load_pipeline()
