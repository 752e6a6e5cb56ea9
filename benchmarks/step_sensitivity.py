"""Measure what an error of the transformer at each denoising step does to the image.

Run `python -m benchmarks.step_sensitivity [PROMPTS]`. It draws images of the shipped model, each as
often as there are steps. In each drawing, noise is added to what the transformer answers at one of
the steps. The sensitivity of that step is the squared change of the image over the squared noise,
as a share of the mean over steps. `rounding=adaround_scale_aware_by_step` weighs errors by it.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu import SHIPPED
from fp4dit.data.prompts import get_texts
from fp4dit.models.base import Pipeline
from fp4dit.utils.calls import Call, read_timestep
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions

STEPS, GUIDANCE, PROMPTS = 20, 4.5, 16
SIZE = 0.01  # root mean square of the noise, as a share of that of the transformer's answer


def measure_step_sensitivity(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
) -> dict[float, float]:
    """Return the sensitivity of each step by its timestep, from the first step on."""
    plain = pipeline.sample(prompts, seeds, steps, guidance)
    sensitivities: dict[float, float] = {}
    for step in range(steps):
        with perturb_step(pipeline.transformer, step) as noise:
            image = pipeline.sample(prompts, seeds, steps, guidance)
        change = (image - plain).square().sum().item()
        sensitivities[noise["timestep"]] = change / noise["squared"]
    mean = sum(sensitivities.values()) / steps
    return {timestep: value / mean for timestep, value in sensitivities.items()}


@contextmanager
def perturb_step(model: nn.Module, step: int) -> Iterator[dict[str, float]]:
    """Context manager: add noise to the answer of one call of a transformer.

    Yields:
        After the call, its `timestep`, and the sum of the noise's squares as `squared`.
    """
    count, noise, generator = 0, {}, torch.Generator().manual_seed(step)

    def perturb(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal count
        count += 1
        if count != step + 1:
            return output
        answer: Tensor = output[0]
        size = SIZE * answer.square().mean().sqrt()
        added = size * torch.randn(answer.shape, generator=generator, dtype=answer.dtype)
        noise["squared"] = added.square().sum().item()
        noise["timestep"] = read_timestep(module, Call(args, kwargs)).flatten()[0].item()
        return (answer + added, *output[1:])

    hook = model.register_forward_hook(perturb, with_kwargs=True)
    try:
        yield noise
    finally:
        hook.remove()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else PROMPTS
    prompts = get_texts(draw_captions(count, ShapesWorld(), held_out=False))
    pipeline = SHIPPED.load()
    sensitivities = measure_step_sensitivity(pipeline, prompts, range(count), STEPS, GUIDANCE)
    print(f"{count} prompts, {STEPS} steps, guidance {GUIDANCE}")
    print("| timestep | sensitivity |\n|---:|---:|")
    for timestep, value in sensitivities.items():
        print(f"| {timestep:.0f} | {value:.3g} |")
    rising = sorted(sensitivities.items())
    print("timesteps:", [round(timestep) for timestep, _ in rising])
    print("weights:", [float(f"{value:.3g}") for _, value in rising])


if __name__ == "__main__":
    main()
