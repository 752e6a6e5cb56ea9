"""The shapes world: one or two coloured shapes on a flat background.

`weights/` holds the model trained on it, which tests run on. Its oracle reads pictures by image
analysis, without learned weights.
"""

from fp4dit.worlds.shapes.world import ShapesWorld, ShapeThing

__all__ = ["ShapeThing", "ShapesWorld"]
