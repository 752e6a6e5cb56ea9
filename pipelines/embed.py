"""Embed the prompts of a run once: `python -m pipelines.embed model=... prompts=... out=/a/file.safetensors`.

With `model.embeddings=/a/file.safetensors` the run then needs no text encoder, neither its memory nor its weights.
"""

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fp4dit import embeddings
from fp4dit.prompts import texts
from pipelines.command import command
from pipelines.resolvers import CONF, require
from pipelines.runtime import Runtime

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="embed")
def main(cfg: DictConfig) -> None:
    for role in ("calibration", "evaluation"):
        require(cfg.prompts[role], OmegaConf.select(cfg, f"prompts.sources.{role}"))
    calibration, evaluation = (instantiate(node, _convert_="all") for node in (cfg.calibration, cfg.prompts.evaluation))
    prompts = calibration.drawn + texts(evaluation(cfg.prompts.count))
    device = Runtime(cfg.trainer).device  # which may not be here, as is to be known before a model is loaded
    pipeline = instantiate(cfg.model).load()
    pipeline.to(device)
    count = embeddings.write(pipeline.embed, prompts, Path(cfg.out))
    log.info("%s: %s texts", cfg.out, count)


if __name__ == "__main__":
    command(main)()
