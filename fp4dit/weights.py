"""Published weights that metrics need: where they lie here, and where they come from. Only `fetch` downloads.

They are named by a path, by `pkg://package/folder`, by `hf-hub:owner/name` (a folder of the hub) or
`hf-hub:owner/name/file`, or by `https://host/file`.
"""

import os
import re
from pathlib import Path

from fp4dit.errors import UserError
from fp4dit.resources import locate

HUB = "hf-hub:"
READ = ["*.safetensors", "*.json", "*.txt", "*.model"]  # of a folder: weights, configs and vocabularies, and no pickle


def find(spec: str) -> Path | None:
    """The file or folder, if it is here."""
    if spec.startswith("https://"):
        place = cached(spec)
    elif spec.startswith(HUB):
        return from_hub(spec, offline=True)
    else:
        place = Path(locate(spec)).expanduser()
    return place if place.exists() else None


def need(spec: str) -> Path:
    """Raises UserError, with what to do, if it is not here."""
    found = find(spec)
    if found is None:
        raise UserError(advice(spec))
    return found


def advice(spec: str) -> str:
    """Where it comes from, and where it belongs."""
    if spec.startswith("https://"):
        return f"{spec} belongs at {cached(spec)}"
    if spec.startswith(HUB):
        from huggingface_hub import constants

        return f"{spec.removeprefix(HUB)} of huggingface.co belongs in {constants.HF_HUB_CACHE}"
    return f"there is nothing at {spec}"


def fetch(spec: str) -> Path:
    """The file or folder, downloaded if it is not here.

    Raises:
        UserError: if it cannot be had, or is not what its name says.
    """
    found = find(spec)
    if found is not None:
        return found
    try:
        if spec.startswith("https://"):
            return download(spec)
        if spec.startswith(HUB) and (got := from_hub(spec, offline=False)):
            return got
    except (OSError, RuntimeError) as error:
        raise UserError(f"{spec} cannot be fetched: {error}") from error
    raise UserError(advice(spec))


def cached(url: str) -> Path:
    """Where torch.hub keeps what it downloads; importing torch to ask it takes seconds."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser()
    return home / "hub" / "checkpoints" / url.rpartition("/")[2]


def download(url: str) -> Path:
    from torch.hub import download_url_to_file  # here, for planning does without torch

    place = cached(url)
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = re.search(r"-([0-9a-f]{8,})\.", place.name)  # torch.hub's custom: a name may hold the start of its SHA-256
    download_url_to_file(url, str(place), digest[1] if digest else None)
    return place


def from_hub(spec: str, offline: bool) -> Path | None:
    """Out of the hub's cache; None if `offline` and not, or not wholly, there."""
    from huggingface_hub import hf_hub_download, snapshot_download  # here, for most commands do without
    from huggingface_hub.errors import LocalEntryNotFoundError

    owner, name, *file = spec.removeprefix(HUB).split("/", 2)
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", file[0], local_files_only=offline))
        folder = Path(snapshot_download(f"{owner}/{name}", allow_patterns=READ, local_files_only=offline))
    except LocalEntryNotFoundError:
        if offline:
            return None
        raise
    return folder if any(folder.rglob("*.safetensors")) else None
