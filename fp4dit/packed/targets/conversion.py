"""Convert folders: a packed transformer or its pipeline to another library's format, and back."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoModel, ModelMixin

from fp4dit.packed.targets.base import Target
from fp4dit.packed.targets.card import render_export_card
from fp4dit.packed.targets.export import describe_export, store_model
from fp4dit.packed.targets.folders import (
    COMPUTE_DTYPES,
    find_transformer,
    read_config,
    read_saved_dtype,
    require_new_folder,
)
from fp4dit.packed.targets.importing import read_model, restore_model_
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json
from fp4dit.utils.safetensors_io import convert_to_os_errors

CARD = "README.md"


def export_folder(
    path: str, out: str, target: Target, dense: Sequence[str] = (), dtype: str | None = None
) -> Sequence[str]:
    """Write a packed transformer, or the pipeline around it, in the format of another library.

    Args:
        path: The folder of the transformer or of its pipeline.
        out: The new folder.
        target: The format.
        dense: Patterns of the names of packed layers that are written as plain weights.
        dtype: The dtype in which weights are exact, and of everything that is not quantized. None
            is the dtype of the files.

    Returns:
        Notes for the user.

    Raises:
        UserError: if there is no such folder, or if a layer cannot be stored exactly.

    Example:
        >>> export_folder("/a/pipeline", "/a/new/folder", SDNQ(), dtype="float32")
    """
    if dtype not in (None, *COMPUTE_DTYPES):
        raise UserError(f"dtype={dtype}: choose {', '.join(COMPUTE_DTYPES)}")
    folder, new = find_transformer(path), require_new_folder(out)
    config = read_config(folder)
    require_packed(f"the transformer in {folder}", config.pop("quantization_config", None))
    check_other_components(folder)
    torch_dtype = COMPUTE_DTYPES[dtype] if dtype else read_saved_dtype(folder)
    model: Any = AutoModel.from_pretrained(str(folder), dtype=torch_dtype)
    stored = store_model(model, target, config, build_skeleton(config), torch_dtype, dense)
    notes = list(describe_export(model, target, stored))
    transformer = copy_pipeline(folder, new)
    target.write(stored, transformer)
    card = render_export_card(target, stored, notes, *read_pipeline_facts(folder))
    (new / CARD).write_text(card)
    return [*notes, f"its README.md says how to load it; it needs {target.packages}"]


def import_folder(path: str, out: str, readers: Sequence[Target]) -> Sequence[str]:
    """Write a transformer in another library's format, or its pipeline, as a packed checkpoint.

    Args:
        path: The folder of the transformer or of its pipeline.
        out: The new folder.
        readers: The formats that are read.

    Returns:
        Notes for the user.

    Raises:
        UserError: if there is no such transformer, or if it cannot be represented exactly.

    Example:
        >>> import_folder("/a/model/in/sdnq", "/a/new/folder", [SDNQ()])
    """
    folder, new = find_transformer(path), require_new_folder(out)
    target = find_reader(folder, readers)
    config = read_config(folder)
    config.pop("quantization_config", None)
    model = build_skeleton(config)
    stored = read_model(folder, model, target)
    torch.nn.Module.to(model, stored.dtype)  # that of diffusers warns of modules in fp32
    restore_model_(model, stored, target)
    transformer = copy_pipeline(folder, new)
    with convert_to_os_errors(transformer):
        model.save_pretrained(transformer)
    return [f"after `import fp4dit`, diffusers loads {out}"]


def find_reader(folder: Path, readers: Sequence[Target]) -> Target:
    """Return the format of a transformer.

    Raises:
        UserError: if it is none of these.
    """
    for target in readers:
        if target.reads(folder):
            return target
    method = read_config(folder).get("quantization_config", {}).get("quant_method")
    names = ", ".join(target.name for target in readers)
    raise UserError(
        f"the transformer in {folder} is quantized by {method}, and has to be by one of {names}"
    )


def require_packed(what: str, config: Mapping[str, Any] | None) -> None:
    """Raise a UserError if a model's `quantization_config` is not that of a packed model."""
    method = config.get("quant_method") if config else None
    if method != "fp4dit":
        raise UserError(f"{what} is quantized by {method}, and has to be by fp4dit")


def check_other_components(folder: Path) -> None:
    """Raise a UserError if another component of the transformer's pipeline is packed."""
    if not is_in_pipeline(folder):
        return
    for path in sorted(folder.parent.glob("*/config.json")):
        config = read_config(path.parent).get("quantization_config") or {}
        if path.parent != folder and config.get("quant_method") == "fp4dit":
            raise UserError(
                f"{path.parent.name} is packed too, and other libraries cannot load it: export "
                "with text_encoder=none"
            )


def is_in_pipeline(folder: Path) -> bool:
    """Return whether the folder of a transformer is part of that of a pipeline."""
    return folder.name == "transformer" and (folder.parent / "model_index.json").is_file()


def read_pipeline_facts(folder: Path) -> tuple[str | None, str]:
    """Return the class of a transformer's pipeline and its model card, if there are any."""
    if not is_in_pipeline(folder):
        return None, ""
    index, card = read_json(folder.parent / "model_index.json"), folder.parent / CARD
    return index["_class_name"], card.read_text() if card.is_file() else ""


def copy_pipeline(folder: Path, new: Path) -> Path:
    """Copy everything of a transformer's pipeline except the transformer, if there is a pipeline.

    Returns:
        The new, empty folder of the transformer.
    """
    new.mkdir(parents=True, exist_ok=True)
    if not is_in_pipeline(folder):
        return new
    skip = shutil.ignore_patterns("transformer", CARD)
    shutil.copytree(folder.parent, new, ignore=skip, dirs_exist_ok=True)
    transformer = new / "transformer"
    transformer.mkdir()
    return transformer


def build_skeleton(config: dict[str, Any]) -> ModelMixin:
    """Build the plain model of a config on the meta device.

    Raises:
        UserError: if diffusers has no such model, or it does not fit the config.
    """
    model_class = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
        raise UserError(f"{config.get('_class_name')} in config.json is not a model of diffusers")
    try:
        with init_empty_weights():
            return model_class.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"config.json does not describe a {model_class.__name__}: {error}"
        ) from error
