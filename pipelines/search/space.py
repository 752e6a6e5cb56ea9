"""Search spaces: the overrides of a command line that have several values, in Hydra's grammar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class SearchSpace:
    """The overrides of a command line, and the distributions of those with several values.

    Attributes:
        all_overrides: All overrides by key.
        distributions: The distribution of each override that has several values, by key.

    Example:
        >>> overrides = OverridesParser.create().parse_overrides(["weight=e2m1_g128,nf4_g128"])
        >>> parse_search_space(overrides).trial_overrides({"weight": "nf4_g128"})
        ('weight=nf4_g128',)
    """

    all_overrides: Mapping[str, Override]
    distributions: dict[str, BaseDistribution]

    def trial_overrides(self, chosen: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the overrides of a trial with these values, in the order of the command line."""
        overrides = []
        for key, override in self.all_overrides.items():
            overrides.append(f"{key}={chosen[key]}" if key in chosen else str(override.input_line))
        return tuple(overrides)

    @property
    def covering_trials(self) -> list[tuple[str, ...]]:
        """Trials in which each discrete choice occurs, with the first values of other options."""
        first = {key: find_first_value(values) for key, values in self.distributions.items()}
        trials = [self.trial_overrides(first)]
        for key, distribution in self.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                for choice in distribution.choices[1:]:
                    trials.append(self.trial_overrides(first | {key: choice}))
        return trials


def parse_search_space(overrides: Sequence[Override]) -> SearchSpace:
    """Return the search space of a command line.

    Raises:
        UserError: if no option has several values.
    """
    all_overrides = {override.get_key_element(): override for override in overrides}
    distributions = {}
    for key, override in all_overrides.items():
        if override.is_sweep_override():
            distributions[key] = make_distribution(override)
    if not distributions:
        raise UserError(
            "nothing to search: give an option several values, such as weight=e2m1_g128,nf4_g128 "
            "or interval(0.1,0.9)"
        )
    return SearchSpace(all_overrides, distributions)


def make_distribution(override: Override) -> BaseDistribution:
    """Return the distribution of an override with several values.

    Choices are unordered; ranges and intervals are ordered. `int(interval(1,9))` has whole numbers
    only, and `tag(log,interval(1e-4,1e-2))` is logarithmic.

    Raises:
        UserError: if the values are invalid.
    """
    sweep = override.value()
    try:
        if isinstance(sweep, IntervalSweep):
            return _make_interval_distribution(sweep)
        if isinstance(sweep, RangeSweep):
            return _make_range_distribution(sweep)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error
    return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))


def _make_interval_distribution(sweep: IntervalSweep) -> BaseDistribution:
    log = "log" in sweep.tags
    if isinstance(sweep.start, int) and isinstance(sweep.end, int):
        return IntDistribution(sweep.start, sweep.end, log=log)
    return FloatDistribution(float(sweep.start or 0), float(sweep.end or 0), log=log)


def _make_range_distribution(sweep: RangeSweep) -> BaseDistribution:
    numbers, step = list(sweep.range()), abs(sweep.step)
    if isinstance(step, int) and all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(min(numbers)), int(max(numbers)), step=step)
    return FloatDistribution(float(min(numbers)), float(max(numbers)), step=step)


def find_first_value(distribution: BaseDistribution) -> Any:
    """Return the first choice of a distribution, or the lower end of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low  # pyright: ignore[reportAttributeAccessIssue]
