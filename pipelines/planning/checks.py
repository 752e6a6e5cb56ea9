"""A check that no prompt is used both for calibration and for the scores."""

from collections.abc import Mapping

from hydra.utils import instantiate
from omegaconf import DictConfig

from fp4dit.utils.errors import UserError
from pipelines.planning.plan import PlannedStage


def check_prompts_disjoint(cfg: DictConfig, stages: Mapping[str, PlannedStage]) -> None:
    """Check the prompts of a run that calibrates, unless `prompts.disjoint` is false.

    Raises:
        UserError: if some prompts are in both sets.
    """
    calibrates = any("calibration" in stage.config for stage in stages.values())
    if not calibrates or not cfg.prompts.get("disjoint", True):
        return
    # Imported here because a run whose results are all in the store does without torch.
    from fp4dit.data.prompts import find_shared_texts

    make_calibration = instantiate(cfg.calibration.prompts, _convert_="all")
    make_evaluation = instantiate(cfg.prompts.evaluation, _convert_="all")
    options = cfg.calibration
    calibration = make_calibration(options.num_prompts + options.num_val_prompts)
    common = find_shared_texts(calibration, make_evaluation(cfg.prompts.count))
    if common:
        raise UserError(
            f"{len(common)} of the {len(calibration)} prompts to calibrate on are also used for "
            f"the scores, such as {' and '.join(map(repr, common[:2]))}: give another file with "
            "prompts.calibration.path=..., or other prompts of the same file with "
            "prompts.calibration.start=..."
        )
