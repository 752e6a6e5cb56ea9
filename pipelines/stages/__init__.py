"""Stages of a run, one module each, called after the nodes of `conf/stages`.

A stage is a frozen dataclass whose fields are the keys of its node. `base.Stage` is its interface,
and `sharded.ShardedStage` the base class of stages that several processes can share.
"""

from typing import TYPE_CHECKING, Any

from fp4dit.utils.hub import hide_loading_bars
from fp4dit.utils.lazy import export_lazily

if TYPE_CHECKING:
    from pipelines.stages.activate import Activate
    from pipelines.stages.base import Stage
    from pipelines.stages.capture import Calibration, Capture
    from pipelines.stages.export import Export
    from pipelines.stages.finetune import Finetune
    from pipelines.stages.generate import Generate, Generation
    from pipelines.stages.histograms import Histograms
    from pipelines.stages.reconstruct import Reconstruct
    from pipelines.stages.score import Score
    from pipelines.stages.train import Train, Training

__all__ = [
    "Activate",
    "Calibration",
    "Capture",
    "Export",
    "Finetune",
    "Generate",
    "Generation",
    "Histograms",
    "Reconstruct",
    "Score",
    "Stage",
    "Train",
    "Training",
]

# The libraries that these modules need take seconds to import, so each is imported when it is used.
_import_stage = export_lazily(
    __name__,
    {
        "base": ["Stage"],
        "activate": ["Activate"],
        "capture": ["Calibration", "Capture"],
        "export": ["Export"],
        "finetune": ["Finetune"],
        "generate": ["Generate", "Generation"],
        "histograms": ["Histograms"],
        "reconstruct": ["Reconstruct"],
        "score": ["Score"],
        "train": ["Train", "Training"],
    },
)


def __getattr__(name: str) -> Any:
    """Import a stage, and hide the loading bars of libraries: stages show their own progress."""
    stage = _import_stage(name)
    hide_loading_bars()
    return stage
