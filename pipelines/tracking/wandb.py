"""Show the results of a finished job in Weights & Biases.

A W&B run is a view of the store. It is written from the folders of the job's stages and never read.
It can be deleted and written again by the same command.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fp4dit.store.store import Store
from fp4dit.utils.extras import require_extra
from pipelines.config.resolvers import CONF
from pipelines.tracking.run_log import (
    Stages,
    log_artifact,
    log_curves,
    log_images,
    log_layers,
    log_score,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbView:
    """Show a job as one run of W&B.

    Attributes:
        project: Project of the run.
        mode: `online` or `offline`.
        dir: Folder in which W&B keeps its files.
        group: Group of the run.
        job_type: Job type of the run.
        name: Name of the run; if empty, it is made from the overrides.
        images: Number of images that are shown beside their references.
        timeout: Seconds to wait for a server that does not answer.

    Example:
        >>> view = WandbView("fp4dit", "offline", "outputs", group=None, job_type=None, name="gptq")
        >>> view.show(cfg, stages, store)
    """

    project: str
    mode: str
    dir: str
    group: str | None
    job_type: str | None
    name: str
    images: int = 8
    timeout: float = 300.0

    def __post_init__(self) -> None:
        require_extra("pipeline", "logger=wandb")

    def show(
        self, cfg: DictConfig, stages: Stages, store: Store, overrides: Sequence[str] = ()
    ) -> None:
        """Show a job. Errors are logged and not raised, because the results are in the store.

        Args:
            cfg: Config of the job.
            stages: Its stages.
            store: Store with their results.
            overrides: Its command line, from which the run gets its name.
        """
        try:
            self.log_run(cfg, stages, store, self.name or make_run_name(overrides) or self.job_type)
        except Exception as error:
            log.warning(
                "W&B does not show all of this job: %r. Its results are in the store, and the "
                "same command shows them again",
                error,
            )

    def log_run(self, cfg: DictConfig, stages: Stages, store: Store, name: str | None) -> None:
        """Write the run. The arguments are those of `show`, and the name of the run."""
        # W&B keeps the images of an offline run in these folders until it is synced. By default
        # they are in HOME.
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(variable, str(Path(self.dir).absolute() / "wandb"))
        import wandb  # here, because the import takes half a second

        # W&B logs its errors and raises them too. `show` logs what is raised.
        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
        folders = {stage.name: store.get_path(stage.name, stage.key) for stage in stages.values()}
        run = wandb.init(
            project=self.project,
            mode=self.mode,  # pyright: ignore[reportArgumentType]
            dir=self.dir,
            group=self.group,
            job_type=self.job_type,
            name=name,
            config={**config, "keys": {name: stage.key for name, stage in stages.items()}},
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=min(30.0, self.timeout),
                finish_timeout=self.timeout,  # by default W&B waits until the server is back
                finish_timeout_raises=True,
                x_disable_stats=True,
            ),
        )
        exit_code = 1
        try:
            log_curves(run, folders)
            log_layers(run, folders)
            log_images(run, stages, folders, self.images)
            log_score(run, stages, store)
            log_artifact(run, stages, folders)
            exit_code = 0
        finally:
            run.finish(exit_code)  # `with run` would print a traceback


def make_run_name(overrides: Sequence[str]) -> str:
    """Return a short name made from overrides.

    The name of an option stands alone, such as `gptq`. Another value stands behind the last word of
    its key, or behind the whole key if another override has the same last word.
    """
    triples = [override.lstrip("+").partition("=") for override in overrides]
    counts = Counter(_last_word(key) for key, _, _ in triples)
    parts = []
    for key, equals, value in triples:
        if (CONF / key).is_dir():
            parts.append(value)
        else:
            word = _last_word(key)
            short_value = value.rpartition("/")[2]
            parts.append(f"{word if counts[word] == 1 else key}{equals}{short_value}")
    return shorten(" ".join(parts), 100, placeholder=" ...")


def _last_word(key: str) -> str:
    removal = "~" if key.startswith("~") else ""
    return removal + key.lstrip("~").rpartition(".")[2]
