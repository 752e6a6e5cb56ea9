"""What a stage is given to run with, and what cannot change its result: devices, and where progress is shown."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError

if TYPE_CHECKING:
    from lightning import Trainer

    from pipelines.progress import Progress

T = TypeVar("T")

# Lightning's remarks on what is done here on purpose, and on its own use of torch.
QUIET = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec.*",
    ".*in eval mode at the start.*",
    ".*predict returned None.*",
    ".*has `__len__` defined.*",
    ".*`srun` command is available.*",
)

SHOWN = ("auto", "bar", "lines", "none")

# What torch may choose from, as Lightning has it. YAML reads on and off as true and false.
DETERMINISTIC = {"warn": "warn", "on": True, "off": False, True: True, False: False}


def is_first() -> bool:
    """Whether this process is the only one of its job, or the first of those that SLURM started on its nodes."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


@dataclass
class Clock:
    """When a line of progress was last printed; shared by the many short fits of one job."""

    last: float = 0.0


@dataclass(frozen=True)
class Runtime:
    """`devices` holds accelerator, devices and strategy; `progress` is bar, lines, none or auto (bar on a terminal);
    `memory_budget_gb` is what calibration data may take of the host's memory: the rest of it lies in files; `command`
    is what a user gave. `deterministic` is on (only operations that always give the same bits), warn (others where
    there is no such one, which is told) or off.

    Raises:
        UserError: `progress` or `deterministic` is something else, or the budget no amount of memory. With 0 all lies
            in files.
    """

    devices: Mapping[str, Any] = field(default_factory=dict)
    progress: str = "auto"
    job: str = ""
    clock: Clock = field(default_factory=Clock)
    memory_budget_gb: float = float("inf")
    command: str = ""
    deterministic: str | bool = "warn"

    def __post_init__(self) -> None:
        if self.deterministic not in DETERMINISTIC:
            raise UserError(f"deterministic={self.deterministic}: choose on, warn or off")
        if self.progress not in SHOWN:
            raise UserError(f"progress={self.progress}: choose one of {', '.join(SHOWN)}")
        if self.memory_budget_gb is None or not self.memory_budget_gb >= 0:
            raise UserError(f"memory_budget_gb={self.memory_budget_gb}: give a number of GB, 0 or more")

    @classmethod
    def of(cls, cfg: DictConfig, **other: Any) -> "Runtime":
        """As the config of a run has it."""
        told = {name: cfg[name] for name in ("progress", "memory_budget_gb", "deterministic")}
        devices: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
        return cls(devices, **told, **other)

    def trainer(self, label: str, **kw: Any) -> "Trainer":
        """A Trainer that computes and shows progress under `label`, and keeps nothing. `kw` goes to the Trainer."""
        import lightning  # here, because a job whose results are all in the store should not wait for torch
        from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
        from torch.utils import deterministic

        from fp4dit.wide import WideMixedPrecision, native
        from pipelines.memory import ReturnMemory

        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no "GPU available: False" per fit
        for noise in QUIET:
            warnings.filterwarnings("ignore", noise)
        deterministic.fill_uninitialized_memory = False  # pyright: ignore  # finds bugs, at some percent of the time
        own = {**self.devices, "deterministic": DETERMINISTIC[self.deterministic]}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        callbacks = [*kw.pop("callbacks", []), ReturnMemory()]
        if self.shown == "none":
            quiet["enable_progress_bar"] = False
        else:
            callbacks.append(self.counter(label))
        if kw.get("devices") == 1:  # then nothing is to be spawned, for what a process learns is gone with it
            kw.setdefault("strategy", "auto")
        if SLURMEnvironment.detect():  # which would take each spawned process for the one that srun started
            kw["plugins"] = [*kw.get("plugins", ()), LightningEnvironment()]
        if kw.get("precision") == "bf16-mixed" and self.device.type == "cpu" and not native():
            del kw["precision"]
            kw["plugins"] = [*kw.get("plugins", ()), WideMixedPrecision()]
        if "max_steps" in kw:
            kw.setdefault("max_epochs", -1)
        return lightning.Trainer(**{**quiet, **own, **kw}, callbacks=callbacks)

    @property
    def shown(self) -> str:
        return ("bar" if sys.stderr.isatty() else "lines") if self.progress == "auto" else self.progress

    def counter(self, label: str) -> "Progress":
        from pipelines.progress import Progress

        return Progress(f"{self.job}  {label}" if self.job else label, self.shown == "bar", self.clock)

    def watched(self, label: str, steps: Sequence[T]) -> Iterator[T]:
        """The same steps, with their progress shown under `label`."""
        counter = self.counter(label)
        if self.shown == "none":
            counter.disable()
        counter.begin(len(steps))
        try:
            for done, step in enumerate(steps, 1):
                yield step
                counter.advance(done)
        finally:
            counter.end()

    def check(self) -> None:
        """Raises UserError as `device`. A CPU is always here: Lightning, which takes seconds, is not asked for it."""
        if self.devices.get("accelerator", "cpu") != "cpu":
            _ = self.device

    @property
    def device(self) -> Any:
        """The torch.device that a Trainer of this runtime computes on.

        Raises:
            UserError: there is none such here.
        """
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        try:
            return self.trainer("").strategy.root_device
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:  # Lightning's, of what it got
            asked = ", ".join(f"trainer.{name}={value}" for name, value in self.devices.items())
            why = " ".join(str(error).split()).rstrip(".!")
            raise UserError(f"{asked} cannot be had here ({why}): leave trainer=... out to run on the CPU") from error
