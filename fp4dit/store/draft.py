"""Drafts: the folders in which unfinished entries are made.

The folder of an entry is called `KEY`, and its lock is the file `KEY.lock` beside it. Until the
entry is finished, its draft is the folder `KEY.draft`, with the journal `KEY.draft.json` beside it.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fp4dit.utils.files import read_json


def lock_path(out: Path) -> Path:
    """Return the path of the lock of an entry, from that of the entry's folder."""
    return out.with_name(f"{out.name}.lock")


def draft_path(out: Path) -> Path:
    """Return the path of the draft of an entry, from that of the entry's folder."""
    return out.with_name(f"{out.name}.draft")


def entry_path(draft: Path) -> Path:
    """Return the path that a draft gets when it is finished."""
    return draft.with_name(draft.name.removesuffix(".draft"))


def journal_path(draft: Path) -> Path:
    """Return the path of the journal of a draft."""
    return draft.with_name(f"{draft.name}.json")


def write_journal(draft: Path, seconds_before: float, needs: Mapping[str, str]) -> None:
    """Write the journal of a draft at the start of an attempt.

    Args:
        draft: The draft.
        seconds_before: Seconds that earlier attempts worked on it.
        needs: Keys of the entries that the draft is made from, by role.
    """
    start = time.time()
    begun = read_journal(draft).get("begun", start)
    journal = {"before": seconds_before, "begun": begun, "start": start, "needs": dict(needs)}
    journal_path(draft).write_text(json.dumps(journal))


def read_journal(draft: Path) -> dict[str, Any]:
    """Return the journal of a draft.

    Returns:
        `before`, the seconds that attempts before the last one worked; `begun` and `start`, when
        the first and the last attempt began, in seconds since the epoch; and `needs`, the keys of
        the inputs by role. Empty if there is no journal, or it cannot be read.
    """
    try:
        return dict(read_json(journal_path(draft)))
    except (OSError, ValueError, TypeError):
        return {}


def last_write_time(draft: Path) -> float:
    """Return when a file of a draft was last written, in seconds since the epoch; 0 if never."""
    latest = 0.0
    for path in draft.rglob("*"):
        with suppress(FileNotFoundError):  # another process may have renamed it meanwhile
            latest = max(latest, path.stat().st_mtime)
    return latest


def seconds_spent(draft: Path) -> float:
    """Return the seconds that killed attempts worked on a draft.

    An attempt counts from its start to the last file that it wrote.
    """
    journal = read_journal(draft)
    try:
        return journal["before"] + max(0.0, last_write_time(draft) - journal["start"])
    except (OSError, KeyError):
        return 0.0
