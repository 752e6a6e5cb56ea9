"""Named tensors in a safetensors file."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Raises OSError if the disk does not take them."""
    with as_os_errors(path):
        own = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(own, path, dict(about) if about else None)


@contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """What safetensors says of the disk in an error of its own, with the number that tells a full one from others."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number, why = (int(found[1]), os.strerror(int(found[1]))) if found else (errno.EIO, str(error))
        raise OSError(number, why, str(path)) from error
