"""A packed transformer in another library's format, or back: `python -m pipelines.convert path=... to=... out=...`"""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from pipelines.command import command
from pipelines.resolvers import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="convert")
def main(cfg: DictConfig) -> None:
    for note in instantiate(cfg.to)(cfg.path, cfg.out):
        print(f"{cfg.out}: {note}")


if __name__ == "__main__":
    command(main)()
