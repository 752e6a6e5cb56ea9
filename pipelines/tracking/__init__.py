"""Weights & Biases: a view of a finished job (`WandbView`), and what its run contains."""

from pipelines.tracking.wandb import WandbView

__all__ = ["WandbView"]
