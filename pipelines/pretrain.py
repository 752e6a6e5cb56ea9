"""Train a world's model: `python -m pipelines.pretrain part=all`, or part by part."""

import os

# Set before torch is imported. A data-parallel part runs two processes, and more threads than one
# in each would compete for the cores of a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from fp4dit.pretraining.data import SeedNoise
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import SafetensorsIO, TimedCheckpoint, load_checkpoint
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF
from pipelines.results.missing import ENVIRONMENT
from pipelines.runtime.callbacks import LossLog, StopOnSignal

TRAINABLE = ("autoencoder", "decoder", "text", "clip", "oracle", "transformer")
PARTS = (*TRAINABLE, "export", "evaluate")  # a world without a trained oracle has no part oracle


def train_part(cfg: DictConfig) -> None:
    """Train a part up to `steps` batches, from its last checkpoint on, and save the result."""
    node, folder = cfg[cfg.part], Path(cfg.folder) / cfg.part
    last = folder / "last.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(cfg.seed, verbose=False)
    task, stop = instantiate(node.task, _convert_="all"), StopOnSignal()
    losses = LossLog(folder / "loss.csv", node.steps, cfg.part)
    trainer = L.Trainer(
        accelerator=cfg.accelerator,
        precision=cfg.precision,
        max_epochs=-1,
        max_steps=node.steps * node.optimizers,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TimedCheckpoint(last, 60.0 * cfg.minutes), stop, losses, SeedNoise(cfg.seed)],
        plugins=[SafetensorsIO()],
        **node.trainer,
    )
    trainer.fit(task, instantiate(node.data), ckpt_path=last if load_checkpoint(last) else None)
    trainer.save_checkpoint(last)
    if trainer.is_global_zero and stop.stopped:
        print(f"stopped. The same command continues from {last}")
    elif trainer.is_global_zero and "save" in node:
        instantiate(node.save, _partial_=True)(task, folder)
    trainer.strategy.barrier()
    if stop.stopped:
        sys.exit(128 + signal.SIGTERM)


def run_all(parts: Sequence[str]) -> None:
    """Run each part in its own process, because a data-parallel part starts copies of its command.

    The model card of the new weights is written too, unless an override says otherwise.
    """
    overrides = ["evaluate.card=true"]
    for override in HydraConfig.get().overrides.task:
        if not override.startswith("part="):
            overrides.append(override)
    for part in parts:
        command_line = [sys.executable, "-m", "pipelines.pretrain", f"part={part}", *overrides]
        child = subprocess.Popen(command_line, env=ENVIRONMENT)
        signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())
        if child.wait():
            sys.exit(child.returncode)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    parts = [part for part in PARTS if part in cfg]
    if cfg.part not in (*parts, "all"):
        raise UserError(f"there is no part {cfg.part!r}: choose {', '.join(parts)} or all")
    if cfg.part == "all":
        run_all(parts)
    elif cfg.part in TRAINABLE:
        train_part(cfg)
    else:
        instantiate(cfg[cfg.part], _convert_="all")


if __name__ == "__main__":
    run_command(main)
