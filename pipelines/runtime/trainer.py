"""Devices, progress display and memory budget: run settings that cannot change a result."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from fp4dit.utils.errors import UserError
from pipelines.runtime.clock import LastPrinted

if TYPE_CHECKING:
    from lightning import Trainer

    from pipelines.runtime.progress import ProgressReporter


T = TypeVar("T")

# Warnings of Lightning about intended settings, and about its own use of torch.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec.*",
    ".*in eval mode at the start.*",
    ".*predict returned None.*",
    ".*has `__len__` defined.*",
    ".*`srun` command is available.*",
)

PROGRESS_MODES = ("auto", "bar", "lines", "none")

# Lightning's value for each value of `deterministic`. YAML reads on and off as true and false.
DETERMINISTIC_MODES = {"warn": "warn", "on": True, "off": False, True: True, False: False}


def is_main_process() -> bool:
    """Return whether this process is the first of its job's (SLURM may start several)."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


@dataclass(frozen=True)
class Runtime:
    """Settings of a run that change neither its results nor their keys.

    Args:
        devices: Lightning's `accelerator`, `devices` and `strategy`.
        progress: `bar`, `lines`, `none`, or `auto` for a bar on a terminal and lines elsewhere.
        job: The name of the job, which precedes each line of progress.
        last_printed: The time of the last line of progress.
        memory_budget_gb: Host memory for calibration data, in GB. Data beyond it are kept in files.
        command: The command line that the user gave, for the manifests.
        deterministic: `on` allows only operations that always give the same bits, `warn` allows
            others, with a warning, if there is no such operation, `off` allows all.

    Raises:
        UserError: if `progress`, `deterministic` or `memory_budget_gb` has an invalid value.

    Example:
        >>> runtime = Runtime({"accelerator": "cpu", "devices": 1}, progress="lines")
        >>> runtime.make_trainer("capture", max_steps=10).fit(task)
    """

    devices: Mapping[str, Any] = field(default_factory=dict)
    progress: str = "auto"
    job: str = ""
    last_printed: LastPrinted = field(default_factory=LastPrinted)
    memory_budget_gb: float = float("inf")
    command: str = ""
    deterministic: str | bool = "warn"

    def __post_init__(self) -> None:
        if self.deterministic not in DETERMINISTIC_MODES:
            raise UserError(f"deterministic={self.deterministic}: choose on, warn or off")
        if self.progress not in PROGRESS_MODES:
            raise UserError(f"progress={self.progress}: choose one of {', '.join(PROGRESS_MODES)}")
        if self.memory_budget_gb is None or not self.memory_budget_gb >= 0:
            raise UserError(
                f"memory_budget_gb={self.memory_budget_gb}: give a number of GB, 0 or more"
            )

    @classmethod
    def from_config(cls, cfg: DictConfig, **other: Any) -> "Runtime":
        """Build the runtime from the config of a run; `other` are further fields."""
        names = ("progress", "memory_budget_gb", "deterministic")
        options = {name: cfg[name] for name in names}
        devices: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
        return cls(devices, **options, **other)

    def make_trainer(self, label: str, **options: Any) -> "Trainer":
        """Return a Lightning Trainer that shows progress under `label` and writes no files.

        Args:
            label: The name of the work, for the progress.
            options: Further arguments of the Trainer.
        """
        # Imported here so that a job whose results are all in the store does not wait for torch.
        import lightning
        from torch.utils import deterministic

        from pipelines.runtime.memory import TrimHeap

        # Without this, each fit would print "GPU available: False".
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        # Filling new memory with NaN finds bugs, but takes 2 to 3 % of the time.
        deterministic.fill_uninitialized_memory = False  # pyright: ignore
        settings = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            **self.devices,
            "deterministic": DETERMINISTIC_MODES[self.deterministic],
        }
        callbacks = [*options.pop("callbacks", []), TrimHeap()]
        if self.progress_mode == "none":
            settings["enable_progress_bar"] = False
        else:
            callbacks.append(self.make_progress(label))
        if options.get("devices") == 1:
            # No process is spawned, because the state of the task would be lost with it.
            options.setdefault("strategy", "auto")
        self._add_plugins(options)
        if "max_steps" in options:
            options.setdefault("max_epochs", -1)
        return lightning.Trainer(**{**settings, **options}, callbacks=callbacks)

    def _add_plugins(self, options: dict[str, Any]) -> None:
        """Add the plugins that SLURM, or a CPU without bf16 products, makes necessary."""
        from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

        from fp4dit.utils.bf16_emulation import Bf16EmulatedMixedPrecision, cpu_has_bf16_matmul

        plugins = [*options.get("plugins", ())]
        if SLURMEnvironment.detect():
            # Lightning would take each spawned process for the one that srun started.
            plugins.append(LightningEnvironment())
        mixed = options.get("precision") == "bf16-mixed"
        if mixed and self.device.type == "cpu" and not cpu_has_bf16_matmul():
            del options["precision"]
            plugins.append(Bf16EmulatedMixedPrecision())
        if plugins:
            options["plugins"] = plugins

    @property
    def progress_mode(self) -> str:
        """The way to show progress: `bar`, `lines` or `none`."""
        if self.progress != "auto":
            return self.progress
        return "bar" if sys.stderr.isatty() else "lines"

    def make_progress(self, label: str) -> "ProgressReporter":
        """Return a progress display with the name of the job and `label` before its counts."""
        from pipelines.runtime.progress import ProgressReporter

        title = f"{self.job}  {label}" if self.job else label
        return ProgressReporter(title, self.progress_mode == "bar", self.last_printed)

    def iter_with_progress(self, label: str, steps: Sequence[T]) -> Iterator[T]:
        """Yield the steps and show their progress under `label`."""
        reporter = self.make_progress(label)
        if self.progress_mode == "none":
            reporter.disable()
        reporter.begin(len(steps))
        try:
            for count, step in enumerate(steps, 1):
                yield step
                reporter.advance(count)
        finally:
            reporter.end()

    def check_device(self) -> None:
        """Raise a UserError if the device is not available. For a CPU, torch is not imported."""
        if self.devices.get("accelerator", "cpu") != "cpu":
            _ = self.device

    @property
    def device(self) -> Any:
        """The torch.device that a Trainer of this runtime computes on.

        Raises:
            UserError: if this machine has no such device.
        """
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        # Lightning raises any of these for an invalid argument.
        errors = (MisconfigurationException, ValueError, TypeError, ImportError)
        try:
            return self.make_trainer("").strategy.root_device
        except errors as error:
            names = ", ".join(f"trainer.{name}={value}" for name, value in self.devices.items())
            reason = " ".join(str(error).split()).rstrip(".!")
            raise UserError(
                f"{names} is not available here ({reason}): leave out trainer=... to run on the CPU"
            ) from error
