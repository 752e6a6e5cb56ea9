"""Prompts, prompt embeddings, and rows of calibration data in memory or in files."""

from fp4dit.data.captured import CapturedTensor
from fp4dit.data.columns import DiskTensor, MemoryBudget, RowSource, RowSubset
from fp4dit.data.embeddings import PromptEmbeddings
from fp4dit.data.prompts import (
    Prompt,
    combine_sets,
    draw_class_prompts,
    load_coco_prompts,
    load_prompts,
)

__all__ = [
    "CapturedTensor",
    "DiskTensor",
    "MemoryBudget",
    "Prompt",
    "PromptEmbeddings",
    "RowSource",
    "RowSubset",
    "combine_sets",
    "draw_class_prompts",
    "load_coco_prompts",
    "load_prompts",
]
