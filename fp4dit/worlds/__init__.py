"""Worlds: procedural sources of captioned pictures that the models of this project are trained on.

A `World` draws scenes, writes their captions, renders them, and judges pictures that a model drew
for a caption. `fp4dit.pretraining` trains a model on any of them.
"""

import lazy_loader

# The libraries of these modules take seconds to import. Each name of __init__.pyi is imported
# when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
