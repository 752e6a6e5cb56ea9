"""`hydra/sweeper=optuna`: a search in which Optuna chooses each job by the scores of earlier jobs.

Hydra looks for sweepers in the package `hydra_plugins` only, and imports all of them whenever it
starts. Slow imports are therefore inside functions.
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

from fp4dit.utils.errors import UserError
from fp4dit.utils.extras import require_extra

Overrides = tuple[str, ...]


class OptunaSweeper(Sweeper):
    """Sweeper that runs the trials which Optuna chooses, to optimize the values that jobs return.

    A job that fails is a failed trial, and the search continues. No combination runs twice. The
    same seed of the sampler chooses the same trials, so a search that was stopped, or that is
    repeated with more trials, finds the earlier results in the store.

    Args:
        n_trials: Number of trials.
        n_jobs: Number of jobs at a time.
        direction: `maximize` or `minimize`, or a list with one for each objective; None for the
            directions of the table's columns.
        sampler: Config of Optuna's sampler.

    Example:
        $ python -m pipelines.run -m hydra/sweeper=optuna objective=psnr weight=e2m1_g128,nf4_g128
    """

    def __init__(self, n_trials: int, n_jobs: int, direction: Any, sampler: DictConfig) -> None:
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.direction, self.sampler = direction, sampler

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.master = hydra_context.config_loader, config
        self.jobs_by_overrides: dict[Overrides, JobReturn] = {}
        plugins = Plugins.instance()
        self.launcher: Any = plugins.instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the search, and return the result of each trial's job.

        Raises:
            UserError: if there is nothing to search, no objective, or Optuna is not installed.
            Exception: the error of the first job, if all jobs failed.
        """
        require_extra("search", "hydra/sweeper=optuna")
        import optuna

        from pipelines.search import space
        from pipelines.search.study import log_results, parse_goal, record_trial, save_results

        if min(self.n_trials, self.n_jobs) < 1:
            raise UserError("hydra.sweeper.n_trials and hydra.sweeper.n_jobs must be at least 1")
        overrides = OverridesParser.create(self.loader).parse_overrides(arguments)
        search_space = space.parse_search_space(overrides)
        # Composing fails if a choice does not exist.
        first, *_ = [self.compose_trial(trial) for trial in search_space.covering_trials]
        goal = parse_goal(first, self.direction)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=instantiate(self.sampler), directions=[*goal.values()])
        results: list[JobReturn] = []
        while len(results) < self.n_trials:
            count = min(self.n_jobs, self.n_trials - len(results))
            if first.dry_run:
                count = self.n_trials
            jobs = self.launch_trials(choose_trials(study, search_space, count))
            if first.dry_run:
                return jobs
            for number, job in enumerate(jobs, len(results)):
                record_trial(study, number, job, goal)
            results += jobs
            save_results(study, results, goal, Path(self.master.hydra.sweep.dir))
        if all(job.status == JobStatus.FAILED for job in results):
            _ = results[0].return_value  # raises the error of the job
        log_results(study, goal)
        return results

    def compose_trial(self, overrides: Overrides) -> DictConfig:
        """Return the config of a trial."""
        return self.loader.load_sweep_config(self.master, list(overrides))

    def launch_trials(self, trials: Sequence[Overrides]) -> list[JobReturn]:
        """Run the trials that are new, and return the result of each trial's job."""
        valid = []
        first_number = len(self.jobs_by_overrides)
        for overrides in dict.fromkeys(trials):
            if overrides not in self.jobs_by_overrides:
                if failure := self.find_conflict(overrides):
                    self.jobs_by_overrides[overrides] = failure
                else:
                    valid.append(overrides)
        jobs = self.launcher.launch(valid, initial_job_idx=first_number) if valid else []
        self.jobs_by_overrides |= zip(valid, jobs, strict=True)
        return [self.jobs_by_overrides[overrides] for overrides in trials]

    def find_conflict(self, overrides: Overrides) -> JobReturn | None:
        """Return a failed job if the overrides do not go together in one config."""
        try:
            self.compose_trial(overrides)
        except (HydraException, OmegaConfBaseException) as error:
            return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=error)
        return None


def choose_trials(study: Any, search_space: Any, count: int) -> list[Overrides]:
    """Ask the Optuna study for some trials, and return their overrides."""
    trials = []
    for _ in range(count):
        params = study.ask(search_space.distributions).params
        trials.append(search_space.trial_overrides(params))
    return trials
