"""The compiled kernels: where they are, and which of them this processor runs.

They are written in C (`integer_kernels.c`, `gelu_kernel.c`) and compiled when the package is
installed. They are called through ctypes. Without a compiler there are none, and `find_kernels`
returns None.
"""

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# Multiplications that are worth the start of a thread, which takes about 20 microseconds.
MULTIPLICATIONS_PER_THREAD = 2**21

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of tokens and products, as the kernels count them


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels.

    Attributes:
        library: The library.
        names: The names of the kernels that this processor runs, by number, the fastest first.
        limits: The largest magnitude of the weights that each multiplies.
    """

    library: ctypes.CDLL
    names: dict[int, str]
    limits: dict[int, int]

    def choose(self, largest_weight: int) -> int:
        """Return the number of the fastest kernel for weights of at most this magnitude.

        Raises:
            ValueError: FP4DIT_KERNEL leaves none for them.
        """
        for number, limit in self.limits.items():
            if largest_weight <= limit:
                return number
        raise ValueError(
            f"the kernels {sorted(self.names.values())} have no sums for weights of up to "
            f"{largest_weight}: set FP4DIT_KERNEL to another one, or unset it"
        )


@lru_cache(maxsize=1)
def find_kernels() -> Kernels | None:
    """Return the kernels, or None if they were not compiled or this processor cannot run them.

    The environment variable FP4DIT_KERNEL=avx2 restricts the choice, and FP4DIT_KERNEL=none turns
    the kernels off.
    """
    wanted = os.environ.get("FP4DIT_KERNEL", "")
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_integer{suffix}")
        if path.is_file():
            return load_kernels(path, wanted)
    logging.getLogger(__name__).warning(
        "fp4dit was installed without a C compiler, so quantized layers are slower on the CPU: "
        "install gcc, then fp4dit again"
    )
    return None


def load_kernels(path: Path, wanted: str = "") -> Kernels | None:
    """Load a compiled library, with the kernels whose name begins with `wanted`."""
    library = ctypes.CDLL(str(path))
    library.fp4dit_kernel_name.restype = ctypes.c_char_p
    names = {}
    for number in range(8):
        name = library.fp4dit_kernel_name(number)
        if name is not None and name.decode().startswith(wanted):
            names[number] = name.decode()
    limits = {number: library.fp4dit_kernel_largest_weight(number) for number in names}
    return Kernels(library, names, limits) if names else None


def require_kernels() -> Kernels:
    """Return the kernels. Call `find_kernels` first, to know that there are any."""
    kernels = find_kernels()
    assert kernels is not None, "no kernels were compiled, or this processor cannot run them"
    return kernels


def count_threads(multiplications: int) -> int:
    """Return how many threads are worth their start for so many multiplications."""
    return max(1, min(torch.get_num_threads(), multiplications // MULTIPLICATIONS_PER_THREAD))
