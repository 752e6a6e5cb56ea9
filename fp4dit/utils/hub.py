"""Locations of weights: a folder, an installed package, a URL, or the Hugging Face hub."""

import logging
import os
import re
import warnings
from importlib.resources import files
from pathlib import Path

from fp4dit.utils.errors import UserError

HUB = "hf-hub:"

# Files of a hub folder that are downloaded: weights, configs and vocabularies, but no pickles.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]


def resolve_package_path(path: str) -> str:
    """Return the folder inside an installed package that `pkg://package/folder` names.

    Any other path, or id of the hub, is returned as it is.
    """
    if not path.startswith("pkg://"):
        return path
    package, _, folder = path.removeprefix("pkg://").partition("/")
    return str(files(package) / folder)


def hide_loading_bars() -> None:
    """Hide, in this process, progress bars and needless warnings of libraries that load models."""
    # Imported here because a plan locates models without these libraries.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # Without a network the hub is asked five more times, each time with two lines of warnings; the
    # failure itself is an error anyway.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks.*")


def find_weights(spec: str) -> Path | None:
    """Return the file or folder of weights on this machine, if it is there.

    Args:
        spec: A path, `pkg://package/folder`, `https://...`, or `hf-hub:owner/name`, which may be
            followed by `/file`.
    """
    if spec.startswith(HUB):
        return resolve_hub_path(spec, offline=True)
    if spec.startswith("https://"):
        path = torch_cache_path(spec)
    else:
        path = Path(resolve_package_path(spec)).expanduser()
    return path if path.exists() else None


def require_weights(spec: str) -> Path:
    """Return the file or folder of weights on this machine.

    Raises:
        UserError: if it is not there; the message says where it belongs.
    """
    path = find_weights(spec)
    if path is None:
        raise UserError(describe_source(spec))
    return path


def describe_source(spec: str) -> str:
    """Describe where weights come from, and where they belong on this machine."""
    if spec.startswith("https://"):
        return f"{spec} belongs at {torch_cache_path(spec)}"
    if spec.startswith(HUB):
        from huggingface_hub import constants

        return f"{spec.removeprefix(HUB)} of huggingface.co belongs in {constants.HF_HUB_CACHE}"
    return f"there is nothing at {spec}"


def fetch_weights(spec: str) -> Path:
    """Return the file or folder of weights, which is downloaded if it is not on this machine.

    Raises:
        UserError: if it cannot be downloaded, or its checksum is not the one in its name.
    """
    path = find_weights(spec)
    try:
        if path is None and spec.startswith("https://"):
            path = download_file(spec)
        elif path is None and spec.startswith(HUB):
            path = resolve_hub_path(spec, offline=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{spec} cannot be fetched: {error}") from error
    if path is None:
        raise UserError(describe_source(spec))
    return path


def torch_cache_path(url: str) -> Path:
    """Return where torch.hub stores a download, without importing torch, which takes seconds."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser()
    return home / "hub" / "checkpoints" / url.rpartition("/")[2]


def download_file(url: str) -> Path:
    """Download a file to the cache of torch.hub.

    The name of the file may contain the first digits of its SHA-256, which are then checked.
    """
    from torch.hub import download_url_to_file  # here, because a plan does without torch

    path = torch_cache_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    download_url_to_file(url, str(path), digest[1] if digest else None)
    return path


def resolve_hub_path(spec: str, offline: bool) -> Path | None:
    """Return a file or folder in the cache of the hub.

    Args:
        spec: `hf-hub:owner/name`, or `hf-hub:owner/name/file`.
        offline: Return None if it is not, or not completely, in the cache, instead of downloading
            it.
    """
    # Imported here because most commands do without it.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    owner, name, *file = spec.removeprefix(HUB).split("/", 2)
    repository = f"{owner}/{name}"
    try:
        if file:
            return Path(hf_hub_download(repository, file[0], local_files_only=offline))
        folder = Path(
            snapshot_download(repository, allow_patterns=HUB_PATTERNS, local_files_only=offline)
        )
    except LocalEntryNotFoundError:
        if offline:
            return None
        raise
    return folder if any(folder.rglob("*.safetensors")) else None
