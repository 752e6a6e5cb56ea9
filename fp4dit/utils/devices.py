"""The choice of a device."""

import torch


def choose_device() -> str:
    """Return `cuda` if this machine has such a GPU that torch can use, or else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
