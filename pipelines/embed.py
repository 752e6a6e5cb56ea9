"""Embed the prompts of a run: `python -m pipelines.embed model=... prompts=... out=FILE`.

With `model.embeddings=FILE` the run then needs neither the memory nor the weights of a text
encoder.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fp4dit.calibration.capture import batch_prompts
from fp4dit.data.embeddings import embed_prompts
from fp4dit.data.prompts import get_texts
from fp4dit.models.prompt_memory import remember_prompts
from fp4dit.models.traced_adapter import TRACE_COUNTS, TRACE_GUIDANCE, TRACE_PROMPTS, TRACE_STEPS
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF, check_files_exist
from pipelines.runtime.trainer import Runtime
from pipelines.stages.capture import Calibration

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
    if hasattr(pipeline, "encode_prompts"):
        count = embed_prompts(pipeline.encode_prompts, prompts, Path(cfg.out))
    else:
        count = remember_prompts(pipeline, list_batches(cfg, calibration), Path(cfg.out))
    log.info("%s: %s texts", cfg.out, count)


def list_batches(
    cfg: DictConfig, calibration: Calibration
) -> Iterator[tuple[Sequence[str], int, float]]:
    """Yield the prompts, the steps and the guidance of each batch that a run encodes.

    The first ones are those with which `model=generic` traces the transformer.
    """
    for count in TRACE_COUNTS:
        yield TRACE_PROMPTS[:count], TRACE_STEPS[-1], TRACE_GUIDANCE
    drawn = get_texts(instantiate(cfg.prompts.evaluation, _convert_="all")(cfg.prompts.count))
    for texts, options in ((calibration.prompt_texts, calibration), (drawn, cfg.generation)):
        for batch in batch_prompts(texts, options.batch_size, 0):
            yield batch.prompts, options.steps, options.guidance


if __name__ == "__main__":
    run_command(main)
