"""Quantize a transformer with the calls that it receives while the pipeline draws prompts."""

import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fp4dit.api.live import LivePipeline
from fp4dit.api.presets import Preset
from fp4dit.packed.export import pack_transformer_
from fp4dit.quantization.rules import assign_rules, find_layers
from fp4dit.rounding.unit_files import load_quantized_
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write, read_json
from fp4dit.utils.warn import warn_user
from pipelines.planning.executor import execute_plan
from pipelines.planning.plan import make_plan
from pipelines.runtime.trainer import Runtime

MOST_VALIDATION_PROMPTS = 8  # as in conf/calibration

FEW_PROMPTS = 16

LIVE_PIPELINE = f"{LivePipeline.__module__}.{LivePipeline.__qualname__}"


def quantize_with_calls_(
    presets: Sequence[tuple[LivePipeline, Preset]],
    prompts: Sequence[str],
    work_dir: Path | str | None,
) -> list[dict[str, float]]:
    """Run the stages up to the hard weights, load these into the live transformers, and pack them.

    Each transformer is calibrated on its own calls, while no transformer is quantized. All are
    changed in place at the end.

    Args:
        presets: The pipeline with each transformer that is quantized, and the preset for it.
        prompts: The prompts to calibrate on.
        work_dir: The folder of the store; None for a temporary one.

    Returns:
        The error of each block of each transformer.

    Raises:
        UserError: if there are too few prompts, or as the stages do.
    """
    check_prompts(prompts)
    errors = []
    with open_work_dir(work_dir) as folder:
        path, made = write_prompts(folder, prompts), []
        for live, preset in presets:
            config = configure_stages(preset.config, live, path, len(prompts))
            needs = dict(preset.config.stages.generate.needs)
            stages, store = make_plan(config), Store(folder / "store")
            results = execute_plan(stages, list(needs.values()), store, make_runtime(live, preset))
            made.append({role: results[name] for role, name in needs.items()})
        for (live, preset), folders in zip(presets, made, strict=True):
            load_and_pack_(live, preset, folders)
            errors.append(read_block_errors(folders["weights"] / "blocks.json"))
    return errors


def check_prompts(prompts: Sequence[str]) -> None:
    """Check the prompts of a calibration, and warn if there are few.

    Raises:
        UserError: if they are not two or more texts.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError('prompts: give a list of texts, such as ["a red bicycle", "two cats"]')
    if len(prompts) < 2:
        raise UserError(
            "prompts: give at least 2, because blocks are measured on prompts that nothing is "
            "learned from; 32 to 128 are sensible"
        )
    if len(prompts) < FEW_PROMPTS:
        warn_user(f"{len(prompts)} prompts are few to calibrate on: 32 to 128 are sensible")


@contextmanager
def open_work_dir(work_dir: Path | str | None) -> Iterator[Path]:
    """Context manager: yield the folder of the progress, or a temporary one."""
    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="fp4dit-") as folder:
            yield Path(folder)
    else:
        folder = Path(work_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def write_prompts(folder: Path, prompts: Sequence[str]) -> Path:
    """Write prompts to a file whose name has their hash, and return its path."""
    text = json.dumps(list(prompts), ensure_ascii=False)
    path = folder / f"prompts-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with atomic_write(path) as part:
        part.write_text(text)
    return path


def configure_stages(
    config: DictConfig, live: LivePipeline, prompts: Path, count: int
) -> DictConfig:
    """Return the config of the stages up to the quantized transformer, on a live pipeline.

    Args:
        config: The config of a run.
        live: The pipeline in memory, which takes the place of `model`.
        prompts: The file of the prompts.
        count: Number of prompts. A fifth of them, and 8 at most, are for validation.
    """
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    num_val = max(1, min(MOST_VALIDATION_PROMPTS, count // 5))
    source: Any = {"_target_": "fp4dit.data.load_prompts", "_partial_": True, "path": str(prompts)}
    config.calibration.prompts = source
    config.calibration.num_prompts = count - num_val
    config.calibration.num_val_prompts = num_val
    config.model = {"_target_": LIVE_PIPELINE, "digest": live.digest, "source": config.model}
    wanted = list_needed_stages(config.stages)
    config.stages = {name: config.stages[name] for name in wanted}
    for node in config.stages.values():
        # Hashes of files. The files are the prompts, whose name has their hash, and the model's.
        node.pop("content", None)
    return config


def list_needed_stages(stages: Mapping[str, Any]) -> list[str]:
    """Return the stages that make the quantized transformer of `generate`, in order."""
    needed: set[str] = set()
    waiting = list(stages["generate"].needs.values())
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += stages[name].needs.values()
    return [name for name in stages if name in needed]


def make_runtime(live: LivePipeline, preset: Preset) -> Runtime:
    """Return a runtime on the device of the pipeline."""
    device: torch.device = live.pipe.device
    devices: dict[str, Any] = {"accelerator": device.type, "devices": 1}
    if device.index is not None:
        devices["devices"] = [device.index]
    in_notebook = "ipykernel" in sys.modules
    return Runtime(
        devices,
        progress="bar" if in_notebook else preset.config.progress,
        memory_budget_gb=preset.config.memory_budget_gb,
        deterministic=preset.config.deterministic,
    )


def load_and_pack_(live: LivePipeline, preset: Preset, folders: Mapping[str, Path]) -> None:
    """Load the hard weights and the scales into the transformer of the pipeline, and pack it.

    A copy is packed, which then takes the place of the original, so that an error changes nothing.
    """
    transformer = copy.deepcopy(live.transformer)
    rules = assign_rules(find_layers(transformer), preset.weight)
    _, input_rules = load_quantized_(
        live.adapt(transformer),
        preset.weight,
        preset.activation,
        folders["weights"],
        folders["activations"],
    )
    pack_transformer_(transformer, rules, input_rules)
    live.transformer.__dict__.update(transformer.__dict__)


def read_block_errors(path: Path) -> dict[str, float]:
    """Read the error of each block, if the stage wrote them."""
    if not path.exists():
        return {}
    return {block["unit"]: block["error"] for block in read_json(path)}
