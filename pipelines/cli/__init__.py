"""Command line: running a command, messages for its errors, dry runs, and their tables.

Start at `run_command`, which every command calls.
"""

import lazy_loader

# The libraries of these modules take seconds to import. Each name of __init__.pyi is imported
# when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
