"""What a search chooses from, said in Hydra's ordinary grammar of overrides."""

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

from fp4dit.errors import UserError


@dataclass(frozen=True)
class Space:
    """The overrides of a command line by what stands before `=`, and those of them that have several values."""

    given: Mapping[str, Override]
    searched: dict[str, BaseDistribution]

    def overrides(self, chosen: Mapping[str, Any]) -> tuple[str, ...]:
        """Of the trial for which this was chosen, in the order in which they were given."""
        one = lambda key, given: f"{key}={chosen[key]}" if key in chosen else str(given.input_line)
        return tuple(one(key, given) for key, given in self.given.items())

    @property
    def each(self) -> list[tuple[str, ...]]:
        """Trials in which each of the discrete choices occurs, the others being the first ones."""
        first = {key: lowest(found) for key, found in self.searched.items()}
        choices = {key: d.choices for key, d in self.searched.items() if isinstance(d, CategoricalDistribution)}
        others = [first | {key: choice} for key, found in choices.items() for choice in found[1:]]
        return [self.overrides(chosen) for chosen in [first, *others]]


def space(overrides: Sequence[Override]) -> Space:
    """Raises UserError if nothing is left to choose."""
    given = {override.get_key_element(): override for override in overrides}
    searched = {key: distribution(override) for key, override in given.items() if override.is_sweep_override()}
    if not searched:
        raise UserError("nothing to search: give an option several values, as weight=e2m1,nf4 or an interval(0.1,0.9)")
    return Space(given, searched)


def distribution(override: Override) -> BaseDistribution:
    """Choices have no order, the numbers of a range and an interval have. `int(interval(1,9))` has whole numbers only,
    `tag(log,interval(1e-4,1e-2))` as many below as above 1e-3."""
    swept = override.value()
    try:
        if isinstance(swept, IntervalSweep):
            log = "log" in swept.tags
            if isinstance(swept.start, int) and isinstance(swept.end, int):
                return IntDistribution(swept.start, swept.end, log=log)
            return FloatDistribution(float(swept.start or 0), float(swept.end or 0), log=log)
        if isinstance(swept, RangeSweep):
            numbers, step = list(swept.range()), abs(swept.step)
            if isinstance(step, int) and all(isinstance(number, int) for number in numbers):
                return IntDistribution(int(min(numbers)), int(max(numbers)), step=step)
            return FloatDistribution(float(min(numbers)), float(max(numbers)), step=step)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error
    return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))


def lowest(found: BaseDistribution) -> Any:
    return found.choices[0] if isinstance(found, CategoricalDistribution) else found.low  # pyright: ignore
