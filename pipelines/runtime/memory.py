"""A callback that keeps a job's resident memory near what it uses."""

import ctypes
from typing import Any

from lightning import Callback


def trim_heap() -> None:
    """Return freed heap memory to the operating system.

    With glibc the heap grows fivefold over some thousand model calls, because the few small
    results that outlive a call keep the large freed blocks around them from being returned.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)


class TrimHeap(Callback):
    """Trims the heap after each test or predict batch, and after each fit.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[TrimHeap()])
    """

    def on_test_batch_end(self, *_: Any) -> None:
        trim_heap()

    def on_predict_batch_end(self, *_: Any) -> None:
        trim_heap()

    def on_train_end(self, *_: Any) -> None:
        trim_heap()
