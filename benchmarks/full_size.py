"""Run PixArt-alpha 512 at full size through all stages: `python -m benchmarks.full_size [folder]`.

It runs on a CPU. The weights are random, of the published architecture, and so are the embeddings
of the texts, because the text encoder has 4.7 billion parameters. Two prompts are captured in two
steps, two of the 28 blocks are learned in 5 steps, and one image is drawn in two steps, quantized
and, for the score, in full precision. Each stage is a process of its own with its own peak memory.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import published
from fp4dit.data import embeddings

MODEL, TOKENS = "pixart_alpha_512", 120
PROMPTS = ["one to learn from", "one to measure on", "one to draw"]
STAGES = ["capture", "reconstruct", "activate", "generate", "score"]
FEW = [
    "calibration.num_prompts=1",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=2",
    "prompts.count=1",
]
FEW += ["generation.steps=2", "rounding.steps=5", "rounding.batch_size=4", "metrics=paired"]
TWO_BLOCKS = [
    "weight=e2m1_g128",
    '+weight.match="transformer_blocks.[01].*"',
    "weight.per_channel_layers=[]",
]


def save_inputs(folder: Path, dtype: torch.dtype) -> None:
    """Save the pipeline, the embeddings and the prompts that all stages read."""
    torch.manual_seed(0)
    published.build_pixart_pipeline(MODEL, dtype).save_pretrained(folder / "model")
    texts = ["", *PROMPTS]
    width = published.PUBLISHED[MODEL][1]["caption_channels"]
    shape = (len(texts), TOKENS)
    embeds, mask = torch.randn(*shape, width, dtype=dtype), torch.ones(shape, dtype=torch.long)
    embeddings.save_embeddings(texts, embeds, mask, folder / "texts.safetensors")
    (folder / "calibration.txt").write_text("\n".join(PROMPTS[:2]))
    (folder / "evaluation.txt").write_text(PROMPTS[2])


def run_stage(target: str, folder: Path, dtype: str) -> tuple[float, float]:
    """Run a stage, and return its seconds, loading included, and its peak memory in GB."""
    overrides = [
        f"model={MODEL}",
        f"model.path={folder}/model",
        f"model.embeddings={folder}/texts.safetensors",
        f"model.dtype={dtype}",
        "prompts=file",
        f"prompts.calibration.path={folder}/calibration.txt",
        f"prompts.evaluation.path={folder}/evaluation.txt",
        *FEW,
        *TWO_BLOCKS,
        f"targets=[{target}]",
        f"outputs={folder}/outputs",
    ]
    command = [sys.executable, "-m", "pipelines.run", *overrides]
    began = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        sys.exit(f"{target} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def main(folder: Path, dtype: str = "bfloat16") -> None:
    """Run all stages, and print the time and memory of each."""
    save_inputs(folder, getattr(torch, dtype))
    results = {stage: run_stage(stage, folder, dtype) for stage in STAGES}
    print(f"{dtype}, {torch.get_num_threads()} threads; the target is at most 12 GB")
    for stage, (seconds, peak) in results.items():
        print(f"{stage:12} {seconds:6.0f} s {peak:6.1f} GB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
