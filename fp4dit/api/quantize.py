"""Quantize a diffusers pipeline in memory."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fp4dit.api.calibrated import quantize_with_calls_
from fp4dit.api.live import LivePipeline, check_not_quantized
from fp4dit.api.presets import Preset, compose_for_pipeline
from fp4dit.api.report import QuantizationReport
from fp4dit.api.settings import keep_torch_settings
from fp4dit.estimate.audit import audit_transformer
from fp4dit.models.hub_files import TRANSFORMER
from fp4dit.packed.encoding.schema import to_tagged_json
from fp4dit.packed.export import count_state_bytes, quantize_encoder_, quantize_to_nearest_
from fp4dit.packed.quantize import assign_text_encoder_rules
from fp4dit.quantization.audit_table import ModelAudit, audit_model
from fp4dit.quantization.rules import Rule
from fp4dit.utils.errors import UserError


def quantize(
    pipe: DiffusionPipeline,
    method: str,
    *,
    prompts: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    components: Sequence[str] = (TRANSFORMER,),
    work_dir: Path | str | None = None,
) -> QuantizationReport:
    """Quantize the transformer of a diffusers pipeline in place, and pack it to its few bits.

    Of a pipeline with several transformers, such as the experts of Wan 2.2, each is quantized on
    its own calls, unless the override `model.transformer=` chooses one.

    `pipe.save_pretrained(folder)` then writes a checkpoint that `from_pretrained` loads wherever
    fp4dit is imported. The pipeline is changed only after everything has succeeded.

    A preset that learns from data runs the transformer on `prompts`: its calls are captured along
    the denoising trajectory, and its weights are rounded block by block. This needs memory for a
    second copy of the transformer. A preset that needs no data takes seconds.

    Args:
        pipe: The pipeline, with its weights in 16 or 32 bits.
        method: Name of a preset (see `methods`), or the path of a YAML file with one.
        prompts: Prompts to calibrate on; 32 to 128 are sensible. The errors of the blocks are
            measured on the last ones, from which nothing is learned.
        overrides: Overrides of the preset, as on the command line:
            `["weight.granularity.size=64", "rounding.steps=500"]`.
        steps: Denoising steps while calibrating; the default is that of the pipeline's call.
        guidance: Guidance scale while calibrating; the default is that of the pipeline's call.
        seed: Another seed calibrates and rounds with other random numbers.
        device: Device to work on, where the pipeline then stays; the default is its own.
        components: Components to quantize: `transformer`, which stands for all transformers, and
            text encoders by their names. The weights of text encoders are rounded to nearest, by
            the option of `text_encoder=`.
        work_dir: Folder that keeps the progress. If the process is killed, the same call goes on
            where it stopped. Without one, the progress is lost.

    Returns:
        A report of what was quantized, what was left in 16 bits and why, and the sizes and errors.

    Raises:
        UserError: if something is wrong with the arguments. The pipeline is then unchanged.

    Example:
        >>> report = fp4dit.quantize(pipe, "nvfp4_4over6")
        >>> report.bits_weight
        4.5
        >>> fp4dit.quantize(pipe, "fp4dit", prompts=["a red bicycle", "two cats on a sofa", ...])
    """
    start = time.monotonic()
    check_components(pipe, components, overrides)
    options = {"steps": steps, "guidance": guidance, "seed": seed}
    preset = compose_for_pipeline(pipe, method, overrides, **options)
    audits: dict[str, ModelAudit] = {}
    encoders = [name for name in components if name != TRANSFORMER]
    for name in encoders:
        assign_text_encoder_rules(pipe.components[name], preset.text_encoder)  # only checks them
    if device is not None:
        pipe.to(device, silence_dtype_warnings=True)  # diffusers says that a CPU cannot run fp16
    with keep_torch_settings():
        if TRANSFORMER in components:
            audits |= quantize_transformers_(pipe, preset, prompts, work_dir)
        for name in encoders:
            audits[name] = quantize_component_(pipe.components[name], preset.text_encoder)
    return QuantizationReport(method, type(pipe).__name__, audits, time.monotonic() - start)


def quantize_transformers_(
    pipe: DiffusionPipeline,
    preset: Preset,
    prompts: Sequence[str] | None,
    work_dir: Path | str | None,
) -> dict[str, ModelAudit]:
    """Quantize and pack the transformers of a pipeline in place, and return the audit of each.

    Raises:
        UserError: if the preset does not fit a model, or needs prompts and there are none. Nothing
            is changed then.
    """
    check_quantizes(preset)
    check_storable(preset)
    fitted, audits = [], {}
    for name, chosen in preset.choose_transformers(list_components(pipe)).items():
        check_quantizable_component(pipe.components[name])
        live = LivePipeline.register(pipe, chosen.source, by_content=work_dir is not None)
        chosen = chosen.fit(live.transformer)
        audits[name] = audit_transformer(live, chosen.weight, chosen.activation)
        fitted.append((live, chosen))
    errors: list[dict[str, float]] = [{} for _ in fitted]
    if preset.data_need is None:
        for live, chosen in fitted:
            rounding = chosen.rounding.elementwise_rounding
            assert rounding is not None
            quantize_to_nearest_(live.transformer, chosen.weight, chosen.activation, rounding)
    elif prompts is None:
        raise UserError(
            f"{preset.method} needs prompts, because {preset.data_need}: give prompts=[...], "
            "of which 32 to 128 are sensible"
        )
    else:
        errors = quantize_with_calls_(fitted, prompts, work_dir)
    for (name, audit), (live, _), blocks in zip(audits.items(), fitted, errors, strict=True):
        size = count_state_bytes(live.transformer)
        audits[name] = replace(audit, bytes=size, block_errors=blocks)
    return audits


def list_components(pipe: DiffusionPipeline) -> list[str]:
    """Return the names of the components that a pipeline has."""
    return [name for name, component in pipe.components.items() if component is not None]


def check_storable(preset: Preset) -> None:
    """Check that a packed model can say how its activations are quantized and transformed.

    Raises:
        UserError: if a class of a rule is not listed in `fp4dit/registry.py`.
    """
    for rule in preset.activation:
        to_tagged_json(rule)
    for rule in preset.weight:
        for spec in rule.transforms:
            to_tagged_json(spec)


def quantize_component_(encoder: Any, rules: Sequence[Rule]) -> ModelAudit:
    """Quantize and pack a text encoder in place."""
    blank = audit_model(encoder, ())
    weights = quantize_encoder_(encoder, rules)
    sizes = {"bytes": count_state_bytes(encoder), "bytes16": blank.bytes16}
    return replace(blank, weights=weights, **sizes)


def check_quantizes(preset: Preset) -> None:
    """Raise a UserError if the stages of a preset do not quantize a trained model."""
    generate = preset.config.stages.get("generate")
    if generate is None or "weights" not in generate.needs:
        raise UserError(f"{preset.method} does not quantize a trained model: choose another method")


def check_components(
    pipe: DiffusionPipeline, names: Sequence[str], overrides: Sequence[str] = ()
) -> None:
    """Check that a pipeline has the components, and that they can be quantized where they are.

    Args:
        pipe: The pipeline.
        names: The names of the components.
        overrides: Overrides, one of which may choose another transformer.

    Raises:
        UserError: if not.
    """
    if isinstance(names, str):
        raise UserError(f"components={names!r}: give a tuple, such as ({names!r},)")
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        raise UserError(
            "the pipeline is offloaded or spread over devices: quantize it first, and enable the "
            "offload afterwards"
        )
    possible = []
    for name in list_components(pipe):
        if name == TRANSFORMER or name.startswith("text_encoder"):
            possible.append(name)
    for name in names:
        if name not in possible:
            raise UserError(
                f"components: this {type(pipe).__name__} has no {name} that can be quantized; it "
                f"has {', '.join(possible) or 'none'}"
            )
        chosen = name
        for override in overrides if name == TRANSFORMER else ():
            if override.startswith("model.transformer="):
                chosen = override.partition("=")[2]
        check_quantizable_component(pipe.components.get(chosen))


def check_quantizable_component(component: Any) -> None:
    """Raise a UserError if a model is quantized already, is compiled, or has LoRA adapters."""
    kind = type(component).__name__
    if isinstance(component, torch._dynamo.OptimizedModule):
        raise UserError("the transformer is compiled: quantize it first, and compile it afterwards")
    if getattr(component, "peft_config", None):
        raise UserError(
            f"this {kind} has LoRA adapters: fuse them first, with pipe.fuse_lora() and "
            "pipe.unload_lora_weights(), or load them after quantizing"
        )
    check_not_quantized(component)
