"""Compare methods on a pipeline: draw with each, and score against full precision.

Packages of the extra `pipeline` are imported where they are used, so that `fp4dit` can be imported
without them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

from fp4dit.api.comparison import ComparedMethod, Comparison, PrintedMetric
from fp4dit.api.live import LivePipeline, copy_transformers
from fp4dit.api.presets import Preset, compose_for_pipeline
from fp4dit.api.quantize import check_components, check_quantizes, list_components, quantize
from fp4dit.calibration.capture import batch_prompts
from fp4dit.models.adapter import TransformerAdapter
from fp4dit.models.hub_files import TRANSFORMER
from fp4dit.quantization.rules import assign_rules, find_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.extras import require_extra
from pipelines.config.resolvers import CONF, list_options, suggest_names
from pipelines.planning.instantiate import instantiate_node

if TYPE_CHECKING:
    from fp4dit.metrics.base import PerImageMetric

FULL_PRECISION = "full precision"

T = TypeVar("T")


def compare(
    pipe: DiffusionPipeline,
    methods: Sequence[str],
    *,
    prompts: Sequence[str],
    calibration_prompts: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    metrics: Sequence[str] = ("psnr", "ssim"),
) -> Comparison:
    """Draw images or videos with several methods, and score them against full precision.

    All methods draw the same prompts with the same noise, and calibrate on the same other prompts.
    The pipeline itself is not quantized: each method gets a copy of its transformers.

    Args:
        pipe: The pipeline, with its weights in 16 or 32 bits.
        methods: Names of presets, or paths of YAML files.
        prompts: Prompts to draw.
        calibration_prompts: Prompts for the presets that need data. None of them may be drawn.
            Without them, such a preset calibrates on the second half of `prompts`, and only the
            first half is drawn, for all methods.
        overrides: Overrides of all presets, as on the command line. What fits only some of them
            belongs in a YAML file of the preset, whose path is then given in `methods`.
        steps: Denoising steps; the default is that of the pipeline's call.
        guidance: Guidance scale; the default is that of the pipeline's call.
        seed: Another seed draws and calibrates with other random numbers.
        device: Device to work on; the default is the pipeline's own.
        metrics: Options of `conf/metrics` with one value for each image or video.

    Raises:
        UserError: if something is wrong with the arguments, before anything is drawn.

    Example:
        >>> print(fp4dit.compare(pipe, ["nvfp4_rtn", "nvfp4_4over6"], prompts=["a fox", "a boat"]))
    """
    require_extra("pipeline", "fp4dit.compare")
    check_components(pipe, (TRANSFORMER,))
    if isinstance(methods, str) or not methods:
        raise UserError('methods: give a list of presets, such as ["gptq", "nvfp4_4over6"]')
    scorers = {name: make_metric(name) for name in metrics}
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed}
    presets = {}
    for method in methods:
        compose = partial(compose_and_check, pipe, method, **options)
        presets[method] = compose_with_shared_overrides(method, overrides, compose)
    prompts, calibration_prompts = split_prompts(presets, prompts, calibration_prompts)
    if device is not None:
        pipe.to(device, silence_dtype_warnings=True)  # diffusers says that a CPU cannot run fp16
    first = next(iter(presets.values()))  # all draw with the same sampler and seeds
    compared = [ComparedMethod(FULL_PRECISION, draw_frames(pipe, first, prompts), {})]
    for method, preset in presets.items():
        clone = copy_transformers(pipe)
        report = quantize(
            clone, method, prompts=calibration_prompts, overrides=overrides, **options
        )
        frames = draw_frames(clone, preset, prompts)
        values = score_frames_of_prompts(scorers, frames, compared[0].frames, prompts)
        compared.append(ComparedMethod(method, frames, values, report))
    seeds = range(first.config.generation.seed, first.config.generation.seed + len(prompts))
    printed = {}
    for name, scorer in scorers.items():
        printed[name] = PrintedMetric(scorer.title, scorer.digits, scorer.factor)
    return Comparison(prompts, seeds, compared, printed)


def compose_and_check(
    pipe: DiffusionPipeline, method: str, overrides: Sequence[str], **options: Any
) -> Preset:
    """Compose a preset, and check that it fits the transformer.

    Raises:
        UserError: if there is no such preset, an override is wrong, or a rule matches no layer.
    """
    preset = compose_for_pipeline(pipe, method, overrides, **options)
    check_quantizes(preset)
    for name, chosen in preset.choose_transformers(list_components(pipe)).items():
        transformer = pipe.components[name]
        assign_rules(find_layers(transformer), chosen.fit(transformer).weight)
    return preset


def compose_with_shared_overrides(
    method: str, overrides: Sequence[str], compose: Callable[[Sequence[str]], T]
) -> T:
    """Compose one of several methods, and say which one it is if it refuses the overrides.

    Args:
        method: Name or file of the method, for the message.
        overrides: Overrides of all methods.
        compose: Composes this method with overrides.
    """
    try:
        return compose(overrides)
    except UserError as error:
        compose(())  # raises the error of a method that is wrong by itself
        raise UserError(
            f"{method}: {error} (overrides go to all methods: if one fits only some of them, write "
            "it into a YAML file of the method, and give the file in place of the name)"
        ) from error


def split_prompts(
    presets: Mapping[str, Preset],
    prompts: Sequence[str],
    calibration_prompts: Sequence[str] | None,
) -> tuple[Sequence[str], Sequence[str] | None]:
    """Return the prompts to draw, and those to calibrate on.

    Raises:
        UserError: if there are too few, or some are for both.
    """
    if isinstance(prompts, str) or not prompts:
        raise UserError('prompts: give a list of texts, such as ["a red bicycle", "two cats"]')
    if calibration_prompts is None:
        if not any(preset.data_need for preset in presets.values()):
            return prompts, None
        half = (len(prompts) + 1) // 2
        prompts, calibration_prompts = prompts[:half], prompts[half:]
    if both := set(prompts) & set(calibration_prompts):
        raise UserError(
            f"{min(both)!r} is both calibrated on and drawn: scores would be too good. Give other "
            "prompts to calibrate on"
        )
    return prompts, calibration_prompts


def draw_frames(
    pipe: DiffusionPipeline, preset: Preset, prompts: Sequence[str]
) -> list[list[Image.Image]]:
    """Draw an image or a video for each prompt, as the stage `generate` does.

    Returns:
        The frames of each video. An image is a single frame.
    """
    from torchvision.transforms.functional import to_pil_image

    options = preset.config.generation
    live = LivePipeline.register(pipe, preset.source)
    adapter: TransformerAdapter = live.adapt(live.transformer)
    drawn = []
    for batch in batch_prompts(list(prompts), options.batch_size, options.seed):
        images = adapter.sample(batch.prompts, batch.seeds, options.steps, options.guidance)
        for image in images.cpu().clamp(0, 1):
            frames = image.reshape(-1, *image.shape[-3:])
            drawn.append([to_pil_image(frame) for frame in frames])
    return drawn


def score_frames_of_prompts(
    metrics: Mapping[str, "PerImageMetric"],
    drawn: Sequence[Sequence[Image.Image]],
    references: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
) -> dict[str, list[float]]:
    """Return the values of each metric, prompt by prompt."""
    from torchvision.transforms.functional import to_tensor

    from fp4dit.evaluation.score import score_frames

    values: dict[str, list[float]] = {name: [] for name in metrics}
    for frames, reference, prompt in zip(drawn, references, prompts, strict=True):
        pixels = torch.stack([to_tensor(frame) for frame in frames])
        target = torch.stack([to_tensor(frame) for frame in reference])
        if len(frames) > 1:
            pixels, target = pixels[None], target[None]
        for name, metric in metrics.items():
            values[name] += score_frames(metric, pixels, target, [prompt]).tolist()
    return values


def make_metric(name: str) -> "PerImageMetric":
    """Build the metric of an option of `conf/metrics`.

    Raises:
        UserError: if there is no such metric, or it has no value for each image.
    """
    from fp4dit.metrics.base import PerImageMetric

    options = list_options("metrics")
    if name not in options:
        raise UserError(f"metrics: there is no {name}; {suggest_names(name, options)}")
    node: Any = OmegaConf.load(CONF / "metrics" / f"{name}.yaml")
    metric = instantiate_node(name, node[name])() if name in node else None
    if not isinstance(metric, PerImageMetric):
        raise UserError(f"metrics: {name} has no value for each image: choose psnr, ssim or lpips")
    return metric
