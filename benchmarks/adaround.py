"""Measure time and memory of a step of AdaRound on a block of PixArt.

Run `python -m benchmarks.adaround [width tokens batch]`. Without arguments it measures the shipped
model's block with the settings of the demo, then PixArt-alpha's for one and for four images of 512
pixels. In the same run it measures what every reconstruction needs, a forward pass of the block and
a backward pass to its weights in their own precision, and the plain reference of
`benchmarks.plain`. The block's inputs are random. Each part has its own process, because its peak
of memory is measured.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise, repeat
from multiprocessing import get_context

import lightning as L
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import plain
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.models.blocks import Unit
from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.quantization.apply import quantize_weights_
from fp4dit.quantization.learnable_rounding import RoundingFactory
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.adaround import adaround, adaround_scale_aware
from fp4dit.rounding.learned import LearnedRounding, fused_adam
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.utils.calls import Call
from fp4dit.utils.resumable import ResumableTrainers
from pipelines.runtime.trainer import Runtime

SIZES: list[tuple[int, ...]] = [(256, 64, 16), (1152, 1024, 1), (1152, 1024, 4)]
HEAD, TEXT, STEPS = 64, 120, 6
GROUPS = [Rule("*", Quantizer(floating(2, 1), PerGroup(128), AbsMax(fp16)))]
ADAM = partial(fused_adam, lr=1e-2)
CPU = torch.device("cpu")


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_peak_mib(device: torch.device) -> float:
    """Return the peak memory in MiB of the device or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bind_trainer(device: torch.device) -> Callable[..., L.Trainer]:
    """Return a function that makes a trainer on `device`."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return partial(Runtime({"accelerator": accelerator, "devices": 1}, "none").make_trainer, "")


class Stopwatch(L.Callback):
    """Callback that records when each step starts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start_times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.start_times.append(synchronized_time(self.device))

    def repeat_example(self, example: tuple[Call, Tensor]) -> Iterator[tuple[Call, Tensor]]:
        """Iterate over the same example, and record when each step starts."""
        while True:
            self.on_train_batch_start()
            yield example

    def shortest_step(self) -> float:
        """Return the least seconds of a step that has a rounding loss, as most steps have."""
        return min(b - a for a, b in pairwise(self.start_times[2:]))


def make_block(width: int) -> nn.Module:
    """Return a random transformer block of PixArt."""
    heads = {
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "cross_attention_dim": width,
    }
    dit = PixArtTransformer2DModel(
        num_layers=1, sample_size=8, use_additional_conditions=False, **heads
    )
    return dit.transformer_blocks[0].requires_grad_(False)


def make_dataset(
    module: nn.Module, width: int, tokens: int, batch: int, device: torch.device = CPU
) -> UnitDataset:
    """Return random inputs of a block, and its outputs."""
    inputs = {
        "hidden": torch.randn(batch, tokens, width),
        "text": torch.randn(batch, TEXT, width),
        "modulation": torch.randn(batch, 6 * width) / 10,
    }

    def make_call(state: Mapping[str, Tensor]) -> Call:
        kwargs = {"encoder_hidden_states": state["text"], "timestep": state["modulation"]}
        return Call((state["hidden"],), kwargs)

    with torch.no_grad():
        target = make_call({name: x.to(device) for name, x in inputs.items()})(module).cpu()
    unit = Unit("", tuple(inputs), make_call, ("hidden",))
    return UnitDataset(unit, inputs, {"hidden": target}, torch.arange(batch))


def select_example(dataset: UnitDataset, batch: int, device: torch.device) -> tuple[Call, Tensor]:
    """Return a call of the whole batch, and its target."""
    rows = torch.arange(batch)
    return dataset.make_call(rows, device), dataset.select(rows).target[0].to(device)


def time_passes_only(
    module: nn.Module, dataset: UnitDataset, batch: int, device: torch.device
) -> float:
    """Return the seconds of a forward and backward pass to all weights."""
    module.requires_grad_(True)
    watch = Stopwatch(device)
    for _, (call, target) in zip(
        range(STEPS), watch.repeat_example(select_example(dataset, batch, device)), strict=False
    ):
        (call(module) - target).square().mean().backward()
    return watch.shortest_step()


def time_adaround(
    module: nn.Module,
    dataset: UnitDataset,
    batch: int,
    device: torch.device,
    learner: RoundingFactory,
    adam: Callable[..., Optimizer] = ADAM,
) -> float:
    """Return the seconds of a step."""
    rules = assign_rules(find_layers(module), GROUPS)
    layers = quantize_weights_(module, rules)
    for layer in layers.values():
        layer.prepare()
    watch = Stopwatch(device)
    method = LearnedRounding(learner, adam, RelativeMSE(), STEPS, batch, precision="bf16-mixed")
    trainers = ResumableTrainers(partial(bind_trainer(device), callbacks=[watch]))
    method.round_unit(module, list(layers.values()), dataset, trainers)
    return watch.shortest_step()


def time_plain_reference(
    module: nn.Module, dataset: UnitDataset, batch: int, device: torch.device
) -> float:
    """Return the seconds of a step."""
    watch = Stopwatch(device)
    plain.fit_roundings(
        module,
        plain.wrap_linear_layers_(module),
        watch.repeat_example(select_example(dataset, batch, device)),
        STEPS,
    )
    return watch.shortest_step()


PARTS: dict[str, Callable[[nn.Module, UnitDataset, int, torch.device], float]] = {
    "forward and backward": time_passes_only,
    "AdaRound": partial(time_adaround, learner=adaround),
    "AdaRound, Adam in many passes": partial(
        time_adaround, learner=adaround, adam=partial(torch.optim.Adam, lr=1e-2)
    ),
    "scale-aware AdaRound": partial(time_adaround, learner=adaround_scale_aware),
    "plain reference": time_plain_reference,
}


def measure_step(
    part: str, width: int, tokens: int, batch: int, device: torch.device = CPU
) -> tuple[float, float]:
    """Return the seconds of a step, and the MiB that it takes beyond those before it."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    module = make_block(width).to(device)
    dataset = make_dataset(module, width, tokens, batch, device)
    start = measure_peak_mib(device)
    seconds = PARTS[part](module, dataset, batch, device)
    return seconds, measure_peak_mib(device) - start


def main(sizes: list[tuple[int, ...]]) -> None:
    for width, tokens, batch in sizes:
        print(f"a block of width {width}, {batch} x {tokens} tokens, one core")
        # Each part has a process of its own, because the peak of a process never falls.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            results = pool.map(measure_step, PARTS, repeat(width), repeat(tokens), repeat(batch))
            for part, (seconds, more) in zip(PARTS, results, strict=True):
                print(
                    f"  {part:30} {1000 * seconds:8.0f} ms a step, "
                    f"{more:6.0f} MiB more than before it",
                    flush=True,
                )


if __name__ == "__main__":
    size = tuple(map(int, sys.argv[1:]))
    main([size] if size else SIZES)
