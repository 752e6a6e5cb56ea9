"""Estimates of time and memory, computed from shapes before anything runs."""

from fp4dit.estimate.machine import Machine
from fp4dit.estimate.stages import Estimator, StageCost

__all__ = [
    "Estimator",
    "Machine",
    "StageCost",
]
