"""The base class of the stages of a run. The module imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runtime.trainer import Runtime

if TYPE_CHECKING:
    from fp4dit.estimate.stages import Estimator, StageCost


Needs = Mapping[str, Path]


class Stage(ABC):
    """A step of a run, which makes a folder of results from the folders of other stages.

    A subclass is a frozen dataclass whose fields are the keys of its node in `conf/stages`.

    Example:
        >>> @dataclass(frozen=True)
        ... class CountCalls(Stage):
        ...     unit: str
        ...
        ...     def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        ...         count = len(list((needs["calls"] / "calls").glob("*.safetensors")))
        ...         (out / "count.txt").write_text(f"{count} {self.unit}")
    """

    @abstractmethod
    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        """Make the results.

        Args:
            needs: The finished folder of each input, by the role that the input plays.
            out: The draft folder to fill. It may hold files of an earlier run that was killed.
                Those need not be made again.
            runtime: The device and the progress display.
        """

    def check(self) -> None:  # noqa: B027  # an optional hook
        """Raise an error if the options cannot work. The stages are checked before one runs.

        Raises:
            ValueError: with a text that names the option to change.
        """

    def assist(self, needs: Needs, out: Path, runtime: Runtime) -> None:  # noqa: B027
        """Do a part of the work of another process that runs this stage in the draft `out`.

        The default does nothing. `ShardedStage` makes shards that no other process holds.
        """

    def estimate_cost(self, make_estimator: "Callable[[], Estimator]") -> "StageCost | None":
        """Return the time and memory that the stage takes on this machine, or None if not known.

        Args:
            make_estimator: Builds the estimator, which imports torch and builds the model without
                weights, so call it only if it is needed.
        """
        return None
