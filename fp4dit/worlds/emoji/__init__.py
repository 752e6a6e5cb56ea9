"""The emoji world: one or two Noto emoji on a softly shaded background.

`weights/` holds the model trained on it and the oracle's network. The artwork itself is not part of
the project: it is read from the npm package `emoji-datasource-google` where truths are rendered.
"""

from fp4dit.worlds.emoji.world import EmojiThing, EmojiWorld

__all__ = ["EmojiThing", "EmojiWorld"]
