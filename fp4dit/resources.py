"""Where a model lies: in a folder, inside an installed package, or on the hub."""

import logging
import warnings
from importlib.resources import files


def locate(path: str) -> str:
    """`pkg://package/folder` is a folder inside an installed package; all else is a folder or a hub id already."""
    if not path.startswith("pkg://"):
        return path
    package, _, folder = path.removeprefix("pkg://").partition("/")
    return str(files(package) / folder)


def hide_loading_bars() -> None:
    """For this process: the bars of diffusers and transformers while they load a pipeline, and warnings of no use."""
    from diffusers.utils import logging as diffusers_logging  # here, for a plan locates models without these
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # diffusers looks for classes that torchao 0.18 no longer has, if that is there; nothing here is stored with it.
    logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").setLevel(logging.ERROR)
    # Without a network the hub is asked five times more, each time with two lines; that it failed is an error anyway.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks.*")
