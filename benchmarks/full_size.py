"""PixArt-alpha 512 at full size through all stages on a CPU: `python -m benchmarks.full_size [folder]`.

Weights are random, of the true architecture, and so are the texts' embeddings: the text encoder, of 4.7 billion
parameters, is what `model.embeddings` does without. Two prompts x 2 steps are captured, two of the 28 blocks learnt in
5 steps, one image drawn in 2, once quantized and, for the score, once as it was. Each stage is a run of its own, of one
process, with a peak of its own.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import published
from fp4dit import embeddings

MODEL, TOKENS = "pixart_alpha_512", 120
PROMPTS = ["one to learn from", "one to measure on", "one to draw"]
STAGES = ["capture", "reconstruct", "activate", "generate", "score"]
FEW = ["calibration.trained=1", "calibration.held_out=1", "calibration.chunk=2", "prompts.count=1"]
FEW += ["generation.steps=2", "rounding.steps=5", "rounding.batch=4", "metrics=paired"]
TWO_BLOCKS = ["weight=e2m1", '+weight.match="transformer_blocks.[01].*"', "weight.by_row=[]"]


def save(folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    published.pipeline(MODEL, dtype).save_pretrained(folder / "model")
    texts = ["", *PROMPTS]
    width = published.PUBLISHED[MODEL][1]["caption_channels"]
    shape = (len(texts), TOKENS)
    embeds, mask = torch.randn(*shape, width, dtype=dtype), torch.ones(shape, dtype=torch.long)
    embeddings.save(texts, embeds, mask, folder / "texts.safetensors")
    (folder / "calibration.txt").write_text("\n".join(PROMPTS[:2]))
    (folder / "evaluation.txt").write_text(PROMPTS[2])


def run(target: str, folder: Path, dtype: str) -> tuple[float, float]:
    """Seconds, loading included, and peak in GB of a stage."""
    model = [f"model={MODEL}", f"model.path={folder}/model", f"model.embeddings={folder}/texts.safetensors"]
    prompts = [f"prompts.{part}.path={folder}/{part}.txt" for part in ("calibration", "evaluation")]
    given = [*model, f"model.dtype={dtype}", "prompts=file", *prompts, *FEW, *TWO_BLOCKS]
    command = [sys.executable, "-m", "pipelines.run", *given, f"targets=[{target}]", f"outputs={folder}/outputs"]
    began = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        sys.exit(f"{target} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def main(folder: Path, dtype: str = "bfloat16") -> None:
    save(folder, getattr(torch, dtype))
    found = {stage: run(stage, folder, dtype) for stage in STAGES}
    print(f"{dtype}, {torch.get_num_threads()} threads; asked are at most 12 GB")
    for stage, (seconds, peak) in found.items():
        print(f"{stage:12} {seconds:6.0f} s {peak:6.1f} GB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
