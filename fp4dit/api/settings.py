"""Keep the settings of torch that Lightning changes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def keep_torch_settings() -> Iterator[None]:
    """Context manager: restore the settings that a Trainer changes for the whole process."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills_memory = deterministic.fill_uninitialized_memory  # pyright: ignore
    benchmark = torch.backends.cudnn.benchmark
    level = logging.getLogger("lightning.pytorch").level
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        deterministic.fill_uninitialized_memory = fills_memory  # pyright: ignore
        torch.backends.cudnn.benchmark = benchmark
        logging.getLogger("lightning.pytorch").setLevel(level)
