"""Where a model lies: in a folder, inside an installed package, or on the hub."""

from importlib.resources import files


def locate(path: str) -> str:
    """`pkg://package/folder` is a folder inside an installed package; all else is a folder or a hub id already."""
    if not path.startswith("pkg://"):
        return path
    package, _, folder = path.removeprefix("pkg://").partition("/")
    return str(files(package) / folder)


def hide_loading_bars() -> None:
    """For this process: the bars of diffusers and transformers while they load a pipeline."""
    from diffusers.utils import logging as diffusers_logging  # here, for a plan locates models without these
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
