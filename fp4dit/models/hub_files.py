"""Read the configs of a pipeline: in a folder, in the hub's cache, in this package, or on the hub.

The configs of the models that `conf/model` names are in `fp4dit/models/published`. The module
imports no torch.
"""

import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import resolve_package_path

INDEX = "model_index.json"
TRANSFORMER = "transformer"  # the component of a pipeline that is quantized
TRANSFORMER_CONFIG = f"{TRANSFORMER}/config.json"

PUBLISHED = Path(__file__).parent / "published"

CONNECTION_SECONDS = 4.0  # after which the hub counts as not reachable

ComponentT = TypeVar("ComponentT")


def read_config(path: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a pipeline, which is downloaded if it is not on this machine.

    Args:
        path: A folder, a hub id, or `pkg://package/folder`.
        name: The name of the file in it, such as `model_index.json`.

    Raises:
        UserError: if there is no such file, or it is not JSON.

    Example:
        >>> read_config("PixArt-alpha/PixArt-XL-2-1024-MS", INDEX)["_class_name"]
        'PixArtAlphaPipeline'
    """
    file = find_config(path, name) or download_config(path, name)
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def find_transformers(components: Mapping[str, ComponentT | None]) -> dict[str, ComponentT]:
    """Return the transformers among what is known of the components of a pipeline, by name.

    Example:
        >>> find_transformers({"vae": "a", "transformer": "b", "transformer_2": None})
        {'transformer': 'b'}
    """
    transformers = {}
    for name, component in components.items():
        if name.startswith(TRANSFORMER) and component is not None:
            transformers[name] = component
    return transformers


def list_indexed_components(index: Mapping[str, Any]) -> list[str]:
    """Return the names of the components that a `model_index.json` says the pipeline has."""
    return [name for name, value in index.items() if isinstance(value, list) and value[1]]


def find_config(path: str, name: str) -> Path | None:
    """Return a file of a pipeline if it is on this machine.

    Of a hub id, the file in the hub's cache comes before the one that this package ships.
    """
    folder = Path(resolve_package_path(path))
    if folder.is_dir():
        places = [folder / name]
    else:
        places = [find_cached_file(path, name), PUBLISHED / path / name]
    return next((place for place in places if place and place.is_file()), None)


def find_cached_file(hub_id: str, name: str) -> Path | None:
    """Return a file in the hub's cache, if it was downloaded before."""
    # Imported here because it takes time, and a folder does without it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(hub_id, name)
    except HFValidationError:  # not a hub id
        return None
    return Path(file) if isinstance(file, str) else None


def download_config(hub_id: str, name: str) -> Path:
    """Download a JSON file from the hub to its cache.

    Raises:
        UserError: if the hub cannot be reached or has no such file, or `hub_id` is a folder.
    """
    from huggingface_hub import hf_hub_download

    if Path(resolve_package_path(hub_id)).is_dir():
        raise UserError(f"{hub_id} is not a diffusers pipeline: the folder has no {name}")
    check_hub_reachable(hub_id)
    try:
        return Path(hf_hub_download(hub_id, name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the {name} of {hub_id} cannot be read from the hub ({reason}): is the id right, and "
            "may you read it (hf auth login)? A folder with the pipeline does as well"
        ) from error


def check_hub_reachable(hub_id: str) -> None:
    """Check that the hub answers, because its own client tries for half a minute.

    Args:
        hub_id: What is needed from the hub, for the message.

    Raises:
        UserError: if the hub does not answer, or the environment says that there is no network.
    """
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        reason = f"{constants.ENDPOINT} cannot be reached"
        if is_reachable(constants.ENDPOINT):
            return
    raise UserError(
        f"{hub_id} is not on this machine, and {reason}: go online, or give the folder of a "
        "diffusers pipeline"
    )


def is_reachable(url: str) -> bool:
    """Return whether a server answers within a few seconds, be it with an error."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=CONNECTION_SECONDS):
            return True
    except HTTPError:
        return True
    except URLError as error:  # the hub's client may know certificates that Python does not
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def check_weights_available(path: str, name: str) -> None:
    """Check that a pipeline is on this machine, or that the hub can be asked for it.

    Args:
        path: A folder or a hub id.
        name: A file that the pipeline has.

    Raises:
        UserError: if neither is so.
    """
    if not Path(path).is_dir() and find_cached_file(path, name) is None:
        check_hub_reachable(path)
