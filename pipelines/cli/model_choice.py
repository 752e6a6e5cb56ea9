"""The model and the method that the arguments of a command choose."""

import atexit
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from fp4dit.models.hub_files import INDEX, read_config
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import CONF, HUB_ID, list_options, suggest_names


def find_model_overrides(model: str) -> list[str]:
    """Return the overrides that choose a model.

    Args:
        model: A name of conf/model, the folder of a pipeline, or a hub id.

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
    from fp4dit.api.families import find_model_option

    class_name = read_config(model, INDEX).get("_class_name", "")
    path = model.replace("\\", "\\\\").replace("'", "\\'")
    return [f"model={find_model_option(class_name)}", f"model.path='{path}'"]


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


def load_pipeline(source: Any) -> Any:
    """Load a pipeline, from safetensors only, in the dtype of its source."""
    from fp4dit.utils.hub import hide_loading_bars

    hide_loading_bars()
    return source.load_pipeline()
