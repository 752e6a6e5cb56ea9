"""Save the features of real images: `python -m pipelines.features images=DIR metrics=fid out=FILE`.

A run with `metrics.fid.reference_path=FILE` then does not need the images.
"""

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from fp4dit.utils.errors import UserError
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF, select_available_metrics
from pipelines.runtime.trainer import Runtime

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="features")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.images)
    if not folder.is_dir():
        raise UserError(f"images={cfg.images}: there is no such folder")
    extractors = set()
    for metric in select_available_metrics(cfg.metrics).values():
        if "extractor" in metric:
            extractors.add(instantiate(metric.extractor))
    if len(extractors) != 1:
        raise UserError(
            "give one metric of image sets, or several that share a network and a filter, such as "
            "metrics=fid"
        )
    from fp4dit.metrics.real_features import collect_features  # its packages are an extra's

    [extractor] = extractors
    name, device = cfg.name or folder.name, Runtime(cfg.trainer).device
    info = collect_features(folder, name, extractor, device, Path(cfg.out))
    log.info("%s: %s of %d images of %s", cfg.out, info.extractor, info.count, info.name)


if __name__ == "__main__":
    run_command(main)
