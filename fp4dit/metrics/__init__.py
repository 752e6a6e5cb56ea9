"""Image metrics. Each is a class that carries its title, its number of digits and its direction.

To add a metric: write a module with a subclass of `PerImageMetric` or `SetMetric` (`base.py`), and
a file in `conf/metrics` that names it; give it a tag in `fp4dit/registry.py`. Tables print it.
`__init__.pyi` exports the names that configs use, as `fp4dit.metrics.PSNR`.
"""

import lazy_loader

# The libraries of these modules take seconds to import. Each name of __init__.pyi is imported
# when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
