"""Download the weights that metrics need: `python -m pipelines.fetch metrics=paper`."""

import hydra
from omegaconf import DictConfig

from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import describe_source, fetch_weights, find_weights
from pipelines.cli.main import run_command
from pipelines.config.resolvers import CONF, find_paths


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="fetch")
def main(cfg: DictConfig) -> None:
    failed, metrics_by_spec = [], map_weights_to_metrics(cfg.metrics)
    for spec, metrics in metrics_by_spec.items():
        print(f"{', '.join(metrics)}: {spec}", flush=True)  # before the download, which may be long
        try:
            place = locate_weights(spec) if cfg.dry_run else fetch_weights(spec)
            print(f"  {place}", flush=True)
        except UserError as error:
            print(f"  {error}", flush=True)
            failed.append(spec)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(metrics_by_spec)} could not be fetched: {', '.join(failed)}"
        )


def locate_weights(spec: str) -> str:
    """Return where weights are, or where they come from and belong."""
    return str(find_weights(spec) or f"not here: {describe_source(spec)}")


def map_weights_to_metrics(metrics: DictConfig) -> dict[str, list[str]]:
    """Return the names of the metrics that need each file or folder of weights."""
    metrics_by_spec: dict[str, list[str]] = {}
    for name, node in metrics.items():
        for _, spec in find_paths(node):
            metrics_by_spec.setdefault(spec, []).append(str(name))
    return metrics_by_spec


if __name__ == "__main__":
    run_command(main)
