"""No prompt that is scored has been calibrated on."""

from collections.abc import Mapping

from hydra.utils import instantiate
from omegaconf import DictConfig

from fp4dit.errors import UserError
from pipelines.plan import Step


def check_disjoint(cfg: DictConfig, steps: Mapping[str, Step]) -> None:
    """Of the prompts of a run, if it calibrates at all and `prompts.disjoint` does not say otherwise.

    Raises:
        UserError: if some are in both sets.
    """
    if not cfg.prompts.get("disjoint", True) or not any("calibration" in step.config for step in steps.values()):
        return
    from fp4dit.prompts import shared  # here, because a run that finds everything does without torch

    calibration, evaluation = (
        instantiate(node, _convert_="all") for node in (cfg.calibration.prompts, cfg.prompts.evaluation)
    )
    calibrated = calibration(cfg.calibration.trained + cfg.calibration.held_out)
    both = shared(calibrated, evaluation(cfg.prompts.count))
    if both:
        raise UserError(
            f"{len(both)} of the {len(calibrated)} prompts to calibrate on are also drawn for the score, such as "
            f"{' and '.join(map(repr, both[:2]))}: give others, by prompts.calibration.path=... or, further on in the "
            "same file, prompts.calibration.start=..."
        )
