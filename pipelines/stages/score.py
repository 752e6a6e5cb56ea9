"""The stage that scores images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from lightning import LightningModule

from fp4dit.evaluation import score
from fp4dit.evaluation.score import ScoreShard, ScoreTask, load_shards, make_shards
from fp4dit.evaluation.summary import split_metrics, summarize_scores
from fp4dit.metrics.base import ImageMetric
from fp4dit.utils.files import read_json, write_json
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs
from pipelines.stages.scalars import collect_scalars
from pipelines.stages.sharded import ShardedStage


@dataclass(frozen=True)
class Score(ShardedStage):
    """Computes every metric, and collects the scalars of the stages before it.

    Args:
        metrics: A factory of each metric, by name.

    Example:
        See the node `score` of `conf/stages/default.yaml`.
    """

    label = "score"
    folder = "shards"

    metrics: Mapping[str, Callable[[], ImageMetric]]

    def check(self) -> None:
        """Raise UserError if a metric has no title, because no table could print it."""
        for factory in self.metrics.values():
            metric = factory.func if isinstance(factory, partial) else factory
            if isinstance(metric, type) and issubclass(metric, ImageMetric):
                metric.describe_column()

    def list_shards(self, needs: Needs) -> list[ScoreShard]:
        prompts = [image["prompt"] for image in read_json(needs["images"] / "images.json")]
        return make_shards(needs["images"] / "images", needs["reference"] / "images", prompts)

    def output_paths(self, item: ScoreShard, folder: Path) -> list[Path]:
        return score.list_score_files(folder, item)

    @cached_property
    def metric_objects(self) -> dict[str, ImageMetric]:
        """The metrics by name. They are built once, because this loads their models."""
        return {name: make() for name, make in self.metrics.items()}

    def select_metrics(self, needs: Needs) -> dict[str, ImageMetric]:
        """Return the metrics to compute: the reference is not compared with itself."""
        is_reference = needs["images"] == needs["reference"]
        selected = {}
        for name, metric in self.metric_objects.items():
            if not (is_reference and metric.compares_to_reference):
                selected[name] = metric
        return selected

    def make_task(self, needs: Needs, folder: Path) -> LightningModule:
        return ScoreTask(*split_metrics(self.select_metrics(needs)), folder)

    def finish(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        images = read_json(needs["images"] / "images.json")
        values = load_shards(out / self.folder, runtime.device)
        summary = summarize_scores(self.select_metrics(needs), values, images)
        write_json(out / "metrics.json", {**summary, "scalars": collect_scalars(needs)})
