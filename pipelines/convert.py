"""Command that converts a packed transformer to another library's format, or back.

python -m pipelines.convert path=/a/pipeline out=/a/new/folder export_format=compressed_tensors
"""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="convert")
def main(cfg: DictConfig) -> None:
    """Convert, and print the notes on the conversion."""
    convert = instantiate(cfg.export_format, _convert_="all")
    for note in convert(cfg.path, cfg.out):
        print(f"{cfg.out}: {note}")


if __name__ == "__main__":
    run_command(main)
