"""Worlds: procedural sources of captioned pictures that the models of this project are trained on.

A `World` draws scenes, writes their captions, renders them, and judges pictures that a model drew
for a caption. `fp4dit.pretraining` trains a model on any of them.
"""

from typing import TYPE_CHECKING

from fp4dit.utils.lazy import export_lazily
from fp4dit.worlds.base import PLACES, RELATIONS, Placement, Scene, Thing, World
from fp4dit.worlds.emoji import EmojiWorld
from fp4dit.worlds.prompts import draw_captions
from fp4dit.worlds.shapes import ShapesWorld

if TYPE_CHECKING:
    from fp4dit.worlds.metric import OracleAccuracy

__all__ = [
    "PLACES",
    "RELATIONS",
    "EmojiWorld",
    "OracleAccuracy",
    "Placement",
    "Scene",
    "ShapesWorld",
    "Thing",
    "World",
    "draw_captions",
]

# The library of metrics takes seconds to import, so it is imported when it is used.
__getattr__ = export_lazily(__name__, {"metric": ["OracleAccuracy"]})
