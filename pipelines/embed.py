"""Embed the prompts of a run: `python -m pipelines.embed model=... prompts=... out=FILE`.

With `model.embeddings=FILE` the run then needs neither the memory nor the weights of a text
encoder.
"""

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fp4dit.data.embeddings import embed_prompts
from fp4dit.data.prompts import get_texts
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF, check_files_exist
from pipelines.runtime.trainer import Runtime

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="embed")
def main(cfg: DictConfig) -> None:
    for role in ("calibration", "evaluation"):
        check_files_exist(cfg.prompts[role], OmegaConf.select(cfg, f"prompts.sources.{role}"))
    calibration = instantiate(cfg.calibration, _convert_="all")
    evaluation = instantiate(cfg.prompts.evaluation, _convert_="all")
    prompts = calibration.prompt_texts + get_texts(evaluation(cfg.prompts.count))
    device = Runtime(cfg.trainer).device  # fails here, before a model is loaded, if missing
    pipeline = instantiate(cfg.model).load()
    pipeline.to(device)
    count = embed_prompts(pipeline.encode_prompts, prompts, Path(cfg.out))
    log.info("%s: %s texts", cfg.out, count)


if __name__ == "__main__":
    run_command(main)
