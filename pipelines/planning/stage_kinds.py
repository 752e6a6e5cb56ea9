"""Stable tags of the stages, and the identity of a stage, which is made of tags.

A stage's key must not change when a class, a module or a package is moved or renamed. Its identity
therefore contains the tags of `fp4dit.registry` and of this module in place of import paths. When
you move something that is listed here, change its path and leave its tag.
"""

from collections.abc import Mapping
from typing import Any

from fp4dit.registry import replace_paths, tags_by_path

# The classes that nodes of conf/stages instantiate.
STAGE_KINDS: dict[str, str] = {
    "capture_stage": "pipelines.stages.Capture",
    "calibration_options": "pipelines.stages.Calibration",
    "reconstruct_stage": "pipelines.stages.Reconstruct",
    "finetune_stage": "pipelines.stages.Finetune",
    "activate_stage": "pipelines.stages.Activate",
    "generate_stage": "pipelines.stages.Generate",
    "second_transformer": "pipelines.stages.SecondTransformer",
    "generation_options": "pipelines.stages.Generation",
    "score_stage": "pipelines.stages.Score",
    "histograms_stage": "pipelines.stages.Histograms",
    "export_stage": "pipelines.stages.Export",
    "train_stage": "pipelines.stages.Train",
    "training_options": "pipelines.stages.Training",
}

# The folders of this project that a config names by `pkg://...`.
FOLDER_KINDS: dict[str, str] = {
    "shapes_world": "pkg://fp4dit/worlds/shapes",
    "emoji_world": "pkg://fp4dit/worlds/emoji",
}


def make_identity(node: Any) -> Any:
    """Return a resolved stage node with tags in place of import paths and of folders.

    >>> make_identity({"_target_": "pipelines.stages.Capture", "version": 1})
    {'_target_': 'capture_stage', 'version': 1}
    """
    tags = {**tags_by_path(), **{path: tag for tag, path in STAGE_KINDS.items()}}
    return _replace_folders(replace_paths(node, tags))


def _replace_folders(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _replace_folders(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_replace_folders(value) for value in node]
    if isinstance(node, str):
        for tag, folder in FOLDER_KINDS.items():
            if node == folder or node.startswith(f"{folder}/"):
                return f"pkg://{tag}{node.removeprefix(folder)}"
    return node
