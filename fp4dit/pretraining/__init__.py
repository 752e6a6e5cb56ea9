"""Train a small PixArt on a world, from nothing to the model that ships.

`architecture` builds the untrained parts, `data` renders endless batches, `tasks` and `denoising`
have one training task per part, `recipe` combines these by the settings in `conf/pretrain.yaml`,
`parts` locates the trained parts, `export` writes the model, and `evaluate` measures it on held-out
captions. `pipelines.pretrain` runs it all.
"""

import lazy_loader

# The libraries of these modules take seconds to import. Each name of __init__.pyi is imported
# when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
