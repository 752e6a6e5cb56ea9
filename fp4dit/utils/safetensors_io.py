"""Write named tensors to a safetensors file."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file.

    Args:
        tensors: The tensors by name, on any device.
        path: The file.
        about: Metadata of the file.

    Raises:
        OSError: if the file cannot be written, such as on a full disk.
    """
    with convert_to_os_errors(path):
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, path, dict(about) if about else None)


@contextmanager
def convert_to_os_errors(path: Path) -> Iterator[None]:
    """Context manager: convert errors of safetensors to an OSError with the number of its cause.

    safetensors raises a class of its own, whose text alone contains the error number.
    """
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise OSError(errno.EIO, str(error), str(path)) from error
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error
