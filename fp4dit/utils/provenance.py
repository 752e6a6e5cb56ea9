"""Commit of this code and versions of the packages that make a result."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fp4dit", "torch", "diffusers", "transformers", "lightning", "numpy")


def read_git_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if it is edited; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def read_package_versions() -> dict[str, str]:
    """Return the versions of the packages of `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
