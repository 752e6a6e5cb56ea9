"""Show what a preset would quantize, before anything is done."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline

from fp4dit.api.families import find_lower_tokens, find_model_option, read_token_limit
from fp4dit.api.live import LivePipeline
from fp4dit.api.presets import Preset, compose_for_pipeline, compose_preset
from fp4dit.api.quantize import check_components, check_quantizes, list_components
from fp4dit.api.report import QuantizationReport
from fp4dit.estimate.audit import audit_transformer
from fp4dit.models.base import PipelineSource
from fp4dit.models.hub_files import INDEX, TRANSFORMER, list_indexed_components, read_config
from fp4dit.models.weight_files import WeightFiles
from fp4dit.quantization.format_forecast import forecast_formats, forecast_from_module


def inspect(
    pipe_or_path: DiffusionPipeline | Path | str, method: str, *, overrides: Sequence[str] = ()
) -> QuantizationReport:
    """Return the report that `quantize` would give for the transformers, before anything is done.

    Nothing is loaded but configs, and nothing is changed. Errors of blocks are not known yet. If
    the weights are on this machine, a sample of them tells which 4-bit format is expected to have
    the least error.

    Args:
        pipe_or_path: A pipeline in memory, or the folder or hub id of one.
        method: Name of a preset, or the path of a YAML file with one.
        overrides: Overrides of the preset, as on the command line.

    Raises:
        UserError: if there is no such preset or pipeline, or they do not fit each other.

    Example:
        >>> print(fp4dit.inspect("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "nvfp4_4over6"))
    """
    audits, name = {}, type(pipe_or_path).__name__
    for component, preset, source in compose_for_transformers(pipe_or_path, method, overrides):
        check_quantizes(preset)
        preset = preset.fit(source.build_on_meta().transformer)
        audit = audit_transformer(source, preset.weight, preset.activation)
        forecast = None
        if isinstance(pipe_or_path, DiffusionPipeline):
            forecast = forecast_from_module(pipe_or_path.components[component], preset.weight)
        elif files := WeightFiles.find(str(pipe_or_path), component):
            forecast = forecast_formats(audit.shapes, preset.weight, files.read_rows)
        audits[component] = replace(audit, forecast=forecast)
    if not isinstance(pipe_or_path, DiffusionPipeline):
        name = read_config(str(pipe_or_path), INDEX)["_class_name"]
    return QuantizationReport(method, name, audits)


def compose_for_transformers(
    pipe_or_path: DiffusionPipeline | Path | str, method: str, overrides: Sequence[str]
) -> Iterator[tuple[str, Preset, PipelineSource]]:
    """Yield the name of each transformer of a pipeline, the preset for it, and its source.

    Raises:
        UserError: if there is no such preset or pipeline.
    """
    if isinstance(pipe_or_path, DiffusionPipeline):
        check_components(pipe_or_path, (TRANSFORMER,), overrides)
        preset = compose_for_pipeline(pipe_or_path, method, overrides)
        for name, chosen in preset.choose_transformers(list_components(pipe_or_path)).items():
            yield name, chosen, LivePipeline.register(pipe_or_path, chosen.source)
        return
    path = str(pipe_or_path)
    index = read_config(path, INDEX)
    class_name = index["_class_name"]
    tokens = find_lower_tokens(class_name, read_token_limit(path), overrides)
    model = find_model_option(class_name)
    preset = compose_preset(method, overrides, model, model__tokens=tokens)
    preset.config.model.path = path
    for name, chosen in preset.choose_transformers(list_indexed_components(index)).items():
        chosen.source.check([])
        yield name, chosen, chosen.source
