"""Keys of results, manifests of store entries, and caches with a checksum."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fp4dit.utils.files import atomic_write, read_json


def compute_key(identity: Mapping[str, Any]) -> str:
    """Return the key of a result: 16 hexadecimal digits of the hash of its identity.

    Args:
        identity: Everything that may change the result, the keys of its inputs included.

    Raises:
        ValueError: if a number is infinite or NaN, which JSON does not have.
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_manifest(out: Path) -> dict[str, Any]:
    """Return the manifest of an entry.

    Raises:
        OSError: if there is no manifest, or it cannot be read.
        ValueError: if it is not JSON, or its checksum is wrong.
    """
    manifest = read_json(out / "manifest.json")
    if not has_valid_digest(manifest):
        raise ValueError(f"{out / 'manifest.json'} was changed")
    return manifest


def has_valid_digest(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest has its own checksum, or none, as those of earlier versions."""
    digest = manifest_digest(manifest)
    return manifest.get("sha256", digest) == digest


def manifest_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of values as JSON, without the item `sha256`."""
    hashed = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def write_cache(path: Path, values: Mapping[str, Any]) -> None:
    """Write values that take time to compute, with a checksum. Errors of the disk are ignored."""
    with suppress(OSError), atomic_write(path) as part:
        part.write_text(json.dumps({**values, "sha256": manifest_digest(values)}, indent=0))


def read_cache(path: Path | None) -> dict[str, Any]:
    """Return the values of a cache; none if it is missing or its checksum is wrong."""
    if path is None:
        return {}
    try:
        values = read_json(path)
        return values if values.pop("sha256") == manifest_digest(values) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
