"""Download the weights that metrics need: `python -m pipelines.fetch metrics=paper`, one after another."""

import hydra
from omegaconf import DictConfig

from fp4dit.errors import UserError
from fp4dit.weights import advice, fetch, find
from pipelines.command import command
from pipelines.resolvers import CONF, paths


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="fetch")
def main(cfg: DictConfig) -> None:
    failed, needs = [], wanted(cfg.metrics)
    for spec, names in needs.items():
        print(f"{', '.join(names)}: {spec}", flush=True)  # first, for what follows may take long
        try:
            print(f"  {(find(spec) or f'not here: {advice(spec)}') if cfg.dry_run else fetch(spec)}", flush=True)
        except UserError as error:
            print(f"  {error}", flush=True)
            failed.append(spec)
    if failed:
        raise UserError(f"{len(failed)} of {len(needs)} could not be fetched: {', '.join(failed)}")


def wanted(metrics: DictConfig) -> dict[str, list[str]]:
    """Each of the weights once, and the metrics that need it."""
    found: dict[str, list[str]] = {}
    for name, node in metrics.items():
        for _, spec in paths(node):
            found.setdefault(spec, []).append(str(name))
    return found


if __name__ == "__main__":
    command(main)()
