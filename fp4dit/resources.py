"""Where a model lies: in a folder, inside an installed package, or on the hub."""

from importlib.resources import files


def locate(path: str) -> str:
    """`pkg://package/folder` is a folder inside an installed package; all else is a folder or a hub id already."""
    if not path.startswith("pkg://"):
        return path
    package, _, folder = path.removeprefix("pkg://").partition("/")
    return str(files(package) / folder)
