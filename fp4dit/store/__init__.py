"""A content-addressed store of results.

A stage's result lives in a folder named by the key of everything it depends on. `Store` finds,
makes and verifies entries; `locks` lets several processes share one store; `archive` moves entries
between stores.
"""

from fp4dit.store.entries import StoreEntry
from fp4dit.store.store import Store

__all__ = [
    "Store",
    "StoreEntry",
]
