"""`hydra/sweeper=optuna`: jobs that Optuna chooses by what earlier ones scored.

Hydra finds sweepers in packages of this name alone, and imports all of them whenever it starts: what takes time to
import stands where it is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fp4dit.errors import UserError

Overrides = tuple[str, ...]


class OptunaSweeper(Sweeper):
    """`n_trials` jobs, `n_jobs` of them at a time; what they return is optimized in `direction`, one or several.

    A job that fails is a failed trial, and the search goes on; what was chosen before is not run again. The same seed
    of the sampler chooses the same trials: a search that was stopped, or is to have more of them, finds those that were
    made in the store.
    """

    def __init__(self, n_trials: int, n_jobs: int, direction: Any, sampler: DictConfig) -> None:
        self.n_trials, self.n_jobs, self.direction, self.sampler = n_trials, n_jobs, direction, sampler

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.master = hydra_context.config_loader, config
        self.known: dict[Overrides, JobReturn] = {}
        self.jobs = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """What the job of each trial returned.

        Raises:
            UserError: if there is nothing to search, nothing to go by, or Optuna is not installed.
            Exception: the first job's, if all of them failed.
        """
        try:
            import optuna
        except ImportError as error:
            message = "hydra/sweeper=optuna needs Optuna: pip install -c constraints.txt -e '.[search]'"
            raise UserError(message) from error
        from pipelines import results, space

        if min(self.n_trials, self.n_jobs) < 1:
            raise UserError("hydra.sweeper.n_trials and hydra.sweeper.n_jobs must be at least 1")
        searched = space.space(OverridesParser.create(self.loader).parse_overrides(arguments))
        first, *_ = [self.composed(overrides) for overrides in searched.each]  # which shows that all choices exist
        goal = results.goal(first, self.direction)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=instantiate(self.sampler), directions=[*goal.values()])
        ask = lambda: searched.overrides(study.ask(searched.searched).params)
        done: list[JobReturn] = []
        while len(done) < self.n_trials:
            at_once = self.n_trials if first.dry_run else min(self.n_jobs, self.n_trials - len(done))
            found = self.launch([ask() for _ in range(at_once)])
            if first.dry_run:
                return found
            for number, job in enumerate(found, len(done)):
                results.tell(study, number, job, goal)
            done += found
            results.save(study, done, goal, Path(self.master.hydra.sweep.dir))
        if all(job.status == JobStatus.FAILED for job in done):
            _ = done[0].return_value  # which raises
        results.show(study, goal)
        return done

    def composed(self, overrides: Overrides) -> DictConfig:
        return self.loader.load_sweep_config(self.master, list(overrides))

    def launch(self, asked: Sequence[Overrides]) -> list[JobReturn]:
        """What each returned, of those that are new and of those that were known."""
        new = [overrides for overrides in dict.fromkeys(asked) if overrides not in self.known]
        failed = {overrides: job for overrides in new if (job := self.illegal(overrides))}
        legal = [overrides for overrides in new if overrides not in failed]
        jobs = self.jobs.launch(legal, initial_job_idx=len(self.known)) if legal else []
        self.known |= failed | dict(zip(legal, jobs, strict=True))
        return [self.known[overrides] for overrides in asked]

    def illegal(self, overrides: Overrides) -> JobReturn | None:
        """The failure of choices that do not go together in one config."""
        try:
            self.composed(overrides)
        except (HydraException, OmegaConfBaseException) as error:
            return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=error)
        return None
