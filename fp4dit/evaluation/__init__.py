"""Generation of images and their scores."""

from fp4dit.evaluation.generate import GenerateTask
from fp4dit.evaluation.score import ScoreShard, ScoreTask
from fp4dit.evaluation.step_cache import FirstBlockCache, LayerOutputCache, StepCache

__all__ = [
    "FirstBlockCache",
    "GenerateTask",
    "LayerOutputCache",
    "ScoreShard",
    "ScoreTask",
    "StepCache",
]
