"""Stages that leave what real ones leave, at once and without torch. `seed: 13` crashes halfway, `-1` is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.runtime import Runtime

Needs = Mapping[str, Path]
PROMPTS = [f"a red circle, number {i}" for i in range(10)]


@dataclass(frozen=True)
class Capture:
    calibration: int

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / "calls").mkdir(exist_ok=True)
        (out / "calls" / "00000.safetensors").write_bytes(b"calls")


@dataclass(frozen=True)
class Reconstruct:
    steps: int

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        assert (needs["calls"] / "calls" / "00000.safetensors").exists()
        units = ("transformer_blocks.0", "transformer_blocks.1")
        lines = [f"{unit},{step},{1 / (step + 1)},0.5" for unit in units for step in range(3)]
        (out / "curve.csv").write_text("\n".join(["unit,step,error,indecision", *lines]))
        (out / "units").mkdir(exist_ok=True)
        for unit in units:
            (out / "units" / f"{unit}.safetensors").write_bytes(unit.encode())
        (out / "blocks.json").write_text(json.dumps([{"unit": unit, "error": 0.01} for unit in units]))


@dataclass(frozen=True)
class Activate:
    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / "sqnr.csv").write_text("layer,timestep,sqnr_db\nproj_out,999,30.5\nproj_out,1,20.5\n")


@dataclass(frozen=True)
class Generate:
    seed: int

    def check(self) -> None:
        if self.seed == -1:
            raise ValueError("a seed cannot be negative")

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / "images").mkdir(exist_ok=True)
        for i in range(len(PROMPTS)):
            Image.new("RGB", (8, 8), (20 * i, self.seed % 255, 0)).save(out / "images" / f"{i:05}.png")
            if self.seed == 13 and i == 5:
                raise RuntimeError("halfway")
        (out / "images.json").write_text(json.dumps([{"prompt": p, "seed": 42} for p in PROMPTS]))


@dataclass(frozen=True)
class Score:
    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        count = len(list((needs["images"] / "images").glob("*.png")))
        scalars = ["block_error", "bits_weight", "bits_activation", "checkpoint_bytes", "calibration_seconds"]
        metrics = {
            "n": count,
            "metrics": {
                "psnr": {"mean": 36.0, "low": 35.44, "high": 36.61},
                "ssim": {"mean": None, "low": None, "high": None},
                "oracle": {"mean": 0.5, "low": 0.25, "high": 0.75},
                "clip": None,
            },
            "scalars": dict(zip(scalars, [0.0123, 4.13, 8.0, 5_250_000, 61.4], strict=True)),
            "per_image": {"psnr": [36.0] * count},
        }
        (out / "metrics.json").write_text(json.dumps(metrics))


@dataclass(frozen=True)
class Hill:
    """A score whose summit is known: `psnr = 40 - (steps - 30)^2 / 100 - |guidance - 3|`. More steps take more bits.
    Below 0 there is no guidance."""

    steps: int
    guidance: float

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        if self.guidance < 0:
            raise RuntimeError("no way up")
        psnr = 40 - (self.steps - 30) ** 2 / 100 - abs(self.guidance - 3)
        means = {"psnr": {"mean": psnr, "low": psnr - 1, "high": psnr + 1}}
        found = {"n": 1, "metrics": means, "scalars": {"bits_weight": 4 + self.steps / 100}, "per_image": {}}
        (out / "metrics.json").write_text(json.dumps(found))
