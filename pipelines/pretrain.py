"""Train the model that ships: `python -m pipelines.pretrain part=all`, or part by part."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two processes share a small machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
import subprocess
import sys
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from fp4dit.errors import UserError
from fp4dit.models.shapes.data import Noise
from fp4dit.resume import Keep, TensorIO, found
from pipelines.command import command
from pipelines.missing import ENVIRONMENT
from pipelines.resolvers import CONF
from pipelines.training import Losses, Stop

TRAINED = ("autoencoder", "decoder", "text", "clip", "transformer")
PARTS = (*TRAINED, "export", "evaluate")


def train(cfg: DictConfig) -> None:
    """Up to `steps` batches, from the last checkpoint on, then save what the next parts need."""
    node, folder = cfg[cfg.part], Path(cfg.folder) / cfg.part
    last = folder / "last.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(cfg.seed, verbose=False)
    task, stop = instantiate(node.task, _convert_="all"), Stop()
    losses = Losses(folder / "loss.csv", node.steps, cfg.part)
    trainer = L.Trainer(
        accelerator=cfg.accelerator,
        precision=cfg.precision,
        max_epochs=-1,
        max_steps=node.steps * node.optimizers,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep(last, 60.0 * cfg.minutes), stop, losses, Noise(cfg.seed)],
        plugins=[TensorIO()],
        **node.trainer,
    )
    trainer.fit(task, instantiate(node.data), ckpt_path=last if found(last) else None)
    trainer.save_checkpoint(last)
    if trainer.is_global_zero and stop.stopped:
        print(f"stopped; the same command goes on from {last}")
    elif trainer.is_global_zero and "save" in node:
        instantiate(node.save, _partial_=True)(task, folder)
    trainer.strategy.barrier()
    if stop.stopped:
        sys.exit(128 + signal.SIGTERM)


def run_all() -> None:
    """Each part in its own process: a data-parallel part starts copies of the command that called it.

    New weights get a new card, unless the user says otherwise.
    """
    given = ["evaluate.card=true", *(o for o in HydraConfig.get().overrides.task if not o.startswith("part="))]
    for part in PARTS:
        child = subprocess.Popen([sys.executable, "-m", "pipelines.pretrain", f"part={part}", *given], env=ENVIRONMENT)
        signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())
        if child.wait():
            sys.exit(child.returncode)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    if cfg.part not in (*PARTS, "all"):
        raise UserError(f"there is no part {cfg.part!r}: choose {', '.join(PARTS)} or all")
    if cfg.part == "all":
        run_all()
    elif cfg.part in TRAINED:
        train(cfg)
    else:
        instantiate(cfg[cfg.part], _convert_="all")


if __name__ == "__main__":
    command(main)()
