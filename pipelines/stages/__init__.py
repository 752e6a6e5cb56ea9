"""Stages of a run, one module each, called after the nodes of `conf/stages`.

A stage is a frozen dataclass whose fields are the keys of its node. `base.Stage` is its interface,
and `sharded.ShardedStage` the base class of stages that several processes can share.
"""

from typing import Any

import lazy_loader

from fp4dit.utils.hub import hide_loading_bars

# The libraries of these modules take seconds to import. Each name of __init__.pyi is imported
# when it is first used.
_import_stage, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Import a stage, and hide the loading bars of libraries: stages show their own progress."""
    stage = _import_stage(name)
    hide_loading_bars()
    return stage
