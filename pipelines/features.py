"""Features of a folder of real images, once: `python -m pipelines.features images=/a/folder metrics=fid out=/a/file`.

A run is then given `metrics.fid.reference_path=/a/file`, and none of the images.
"""

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from fp4dit.errors import UserError
from fp4dit.metrics.reference import collect
from pipelines.command import command
from pipelines.resolvers import CONF, present
from pipelines.runtime import Runtime

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="features")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.images)
    if not folder.is_dir():
        raise UserError(f"images={cfg.images}: there is no such folder")
    extractors = {instantiate(m.extractor) for m in present(cfg.metrics).values() if "extractor" in m}
    if len(extractors) != 1:
        raise UserError("give one metric of a set, or some that share a network and a filter: metrics=fid")
    [extractor] = extractors
    known = collect(folder, cfg.name or folder.name, extractor, Runtime(cfg.trainer).device, Path(cfg.out))
    log.info("%s: %s of %d images of %s", cfg.out, known.extractor, known.count, known.name)


if __name__ == "__main__":
    command(main)()
