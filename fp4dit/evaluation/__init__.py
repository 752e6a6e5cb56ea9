"""Generation of images and their scores."""

from fp4dit.evaluation.generate import GenerateTask
from fp4dit.evaluation.score import ScoreShard, ScoreTask

__all__ = [
    "GenerateTask",
    "ScoreShard",
    "ScoreTask",
]
