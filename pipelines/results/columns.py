"""Columns of tables and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

from fp4dit.tables.rows import TableColumn
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import CONF, suggest_names

# Numbers against which plots show the quality of images.
COST_COLUMNS = (
    "bit_operations",
    "bits_weight",
    "bits_activation",
    "checkpoint_bytes",
    "calibration_seconds",
)


@dataclass(frozen=True)
class ColumnCatalog:
    """All columns that a table can show.

    Attributes:
        metrics: Import path of the class of each metric.
        numbers: Fields of the `TableColumn` of every other number.

    Example:
        >>> load_catalog().find_column("psnr").title
        'PSNR, dB'
    """

    metrics: Mapping[str, str]
    numbers: Mapping[str, Mapping[str, Any]]

    def __contains__(self, name: str) -> bool:
        metric = name.partition(":")[0]
        return metric in self.metrics or metric in self.numbers

    def find_column(self, name: str) -> TableColumn:
        """Return a column. `NAME:GROUP` is a metric of one group of prompts.

        The class of a metric is imported, and torch with it.

        Raises:
            UserError: if there is no such column, or the metric cannot be printed.
        """
        metric, _, group = name.partition(":")
        if metric in self.numbers:
            column = TableColumn(name, **self.numbers[metric])
        elif metric in self.metrics:
            column = TableColumn(name, **describe_metric(metric, self.metrics[metric]))
        else:
            known = [*self.metrics, *self.numbers]
            raise UserError(f"there is no column {name!r}; {suggest_names(metric, known)}")
        if not group:
            return column
        return replace(column, title=f"{column.title}, {group.replace('-', ' ')}")


def describe_metric(name: str, target: str) -> dict[str, Any]:
    """Return the fields of a metric's column, from the class attributes of the metric.

    Raises:
        UserError: if the class is not a metric, or has no title.
    """
    from fp4dit.metrics.base import ImageMetric  # here, because it imports torch

    metric = get_object(target)
    if not (isinstance(metric, type) and issubclass(metric, ImageMetric)):
        raise UserError(
            f"metrics.{name}: {target} is not a metric: derive it from PerImageMetric or SetMetric "
            "in fp4dit/metrics/base.py"
        )
    return metric.describe_column()


def load_catalog(
    metrics: Mapping[str, Any] | None = None, numbers: Mapping[str, Any] | None = None
) -> ColumnCatalog:
    """Return the columns of conf/metrics and conf/table/_base.yaml.

    Args:
        metrics: Config nodes of further metrics, by name.
        numbers: `columns` of a table, in place of those of conf/table/_base.yaml.
    """
    targets: dict[str, str] = {}
    for path in sorted((CONF / "metrics").glob("*.yaml")):
        targets |= read_targets(OmegaConf.load(path))
    targets |= read_targets(metrics or {})
    defaults: Any = OmegaConf.load(CONF / "table" / "_base.yaml").columns
    return ColumnCatalog(targets, defaults if numbers is None else numbers)


def read_targets(metrics: Any) -> dict[str, str]:
    """Return the import path of each metric of a config node that has one."""
    targets = {}
    for name, node in metrics.items():
        if "_target_" in node:
            targets[str(name)] = node["_target_"]
    return targets
