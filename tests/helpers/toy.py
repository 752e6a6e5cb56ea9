"""Stages that leave the files of real stages at once, and without torch.

With `seed=13` the stage that generates images crashes halfway; it refuses `seed=-1`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage

PROMPTS = [f"a red circle, number {i}" for i in range(10)]


@dataclass(frozen=True)
class Capture(Stage):
    calibration: int

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / "calls").mkdir(exist_ok=True)
        (out / "calls" / "00000.safetensors").write_bytes(b"calls")


@dataclass(frozen=True)
class Reconstruct(Stage):
    steps: int

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        assert (needs["calls"] / "calls" / "00000.safetensors").exists()
        units = ("transformer_blocks.0", "transformer_blocks.1")
        lines = [f"{unit},{step},{1 / (step + 1)},0.5" for unit in units for step in range(3)]
        (out / "curve.csv").write_text("\n".join(["unit,step,error,rounding_loss", *lines]))
        (out / "units").mkdir(exist_ok=True)
        for unit in units:
            (out / "units" / f"{unit}.safetensors").write_bytes(unit.encode())
        (out / "blocks.json").write_text(
            json.dumps([{"unit": unit, "error": 0.01} for unit in units])
        )


@dataclass(frozen=True)
class Activate(Stage):
    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / "sqnr.csv").write_text(
            "layer,timestep,sqnr_db\nproj_out,999,30.5\nproj_out,1,20.5\n"
        )


@dataclass(frozen=True)
class Generate(Stage):
    seed: int

    def check(self) -> None:
        if self.seed == -1:
            raise ValueError("a seed cannot be negative")

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / "images").mkdir(exist_ok=True)
        for i in range(len(PROMPTS)):
            Image.new("RGB", (8, 8), (20 * i, self.seed % 255, 0)).save(
                out / "images" / f"{i:05}.png"
            )
            if self.seed == 13 and i == 5:
                raise RuntimeError("halfway")
        (out / "images.json").write_text(json.dumps([{"prompt": p, "seed": 42} for p in PROMPTS]))


@dataclass(frozen=True)
class Score(Stage):
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        count = len(list((needs["images"] / "images").glob("*.png")))
        scalars = [
            "block_error",
            "bits_weight",
            "bits_activation",
            "checkpoint_bytes",
            "calibration_seconds",
            "bit_operations",
        ]
        metrics = {
            "n": count,
            "metrics": {
                "psnr": {"mean": 36.0, "low": 35.44, "high": 36.61},
                "ssim": {"mean": None, "low": None, "high": None},
                "oracle": {"mean": 0.5, "low": 0.25, "high": 0.75},
                "clip": None,
            },
            "scalars": dict(
                zip(scalars, [0.0123, 4.13, 8.0, 5_250_000, 61.4, 5.1e11], strict=True)
            ),
            "per_image": {"psnr": [36.0] * count},
        }
        (out / "metrics.json").write_text(json.dumps(metrics))


@dataclass(frozen=True)
class Hill(Stage):
    """Score with a known maximum, psnr = 40 - (steps - 30)^2 / 100 - |guidance - 3|.

    More steps take more bits. A negative guidance crashes.
    """

    steps: int
    guidance: float

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        if self.guidance < 0:
            raise RuntimeError("negative guidance")
        psnr = 40 - (self.steps - 30) ** 2 / 100 - abs(self.guidance - 3)
        means = {"psnr": {"mean": psnr, "low": psnr - 1, "high": psnr + 1}}
        results = {
            "n": 1,
            "metrics": means,
            "scalars": {"bits_weight": 4 + self.steps / 100},
            "per_image": {},
        }
        (out / "metrics.json").write_text(json.dumps(results))
