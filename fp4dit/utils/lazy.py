"""Names that a package exports and that are imported when they are first used."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def export_lazily(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of `package`, given the names that each module defines.

    Args:
        package: the package's `__name__`.
        names: what each of its modules exports, by the module's name within the package.

    Example::

        __getattr__ = export_lazily(__name__, {"clip": ["ClipScore"]})
    """
    module_of = {name: module for module, exports in names.items() for name in exports}

    def import_attribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return import_attribute
