"""Seconds and memory of a step of AdaRound on a block of PixArt: `python -m benchmarks.adaround [width tokens batch]`.

Without arguments the shipped model's block as the laptop's budget learns it, then PixArt-alpha's for one and for four
images of 512 pixels. Beside it in the same run what no reconstruction can do without: the block forwards, and
backwards to its weights, in the precision it has; and the plain reference, `benchmarks.plain`. The block's inputs are
random; each part has a process of its own, whose peak it is.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
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
from fp4dit import policy
from fp4dit.calls import Call
from fp4dit.examples import Examples
from fp4dit.formats import floating, fp16
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.resume import Trainers
from fp4dit.rounding import Learner, adam, logit, ulp
from fp4dit.scales import AbsMax
from fp4dit.stream import Unit
from fp4dit.tasks.reconstruct import Learnt, Relative
from pipelines.runtime import Runtime

SIZES: list[tuple[int, ...]] = [(256, 64, 16), (1152, 1024, 1), (1152, 1024, 4)]
HEAD, TEXT, STEPS = 64, 120, 6
GROUPS = [Rule("*", Quantizer(floating(2, 1), Granularity("group", 128), AbsMax(fp16)))]
ADAM = partial(adam, lr=1e-2)
CPU = torch.device("cpu")


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device) -> float:
    """MiB: of the device's memory or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trainer(device: torch.device) -> Callable[..., L.Trainer]:
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return partial(Runtime({"accelerator": accelerator, "devices": 1}, "none").trainer, "")


class Stopwatch(L.Callback):
    """When each step began."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.began.append(now(self.device))

    def handing_out(self, example: tuple[Call, Tensor]) -> Iterator[tuple[Call, Tensor]]:
        """The same one at each step."""
        while True:
            self.on_train_batch_start()
            yield example

    def least(self) -> float:
        """Seconds of a step, of those whose roundings are pressed to decide, as most are."""
        return min(b - a for a, b in pairwise(self.began[2:]))


def block(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "cross_attention_dim": width}
    dit = PixArtTransformer2DModel(num_layers=1, sample_size=8, use_additional_conditions=False, **heads)
    return dit.transformer_blocks[0].requires_grad_(False)


def examples(module: nn.Module, width: int, tokens: int, batch: int, device: torch.device = CPU) -> Examples:
    given = {
        "hidden": torch.randn(batch, tokens, width),
        "text": torch.randn(batch, TEXT, width),
        "modulation": torch.randn(batch, 6 * width) / 10,
    }
    call = lambda s: Call((s["hidden"],), {"encoder_hidden_states": s["text"], "timestep": s["modulation"]})
    with torch.no_grad():
        answer = call({name: x.to(device) for name, x in given.items()})(module).cpu()
    return Examples(Unit("", tuple(given), call, ("hidden",)), given, {"hidden": answer}, torch.arange(batch))


def example(given: Examples, batch: int, device: torch.device) -> tuple[Call, Tensor]:
    """A call, and the answer wanted."""
    rows = torch.arange(batch)
    return given.call(rows, device), given.at(rows).target[0].to(device)


def bare(module: nn.Module, given: Examples, batch: int, device: torch.device) -> float:
    """Seconds of a forward and backward pass to all weights."""
    module.requires_grad_(True)
    watch = Stopwatch(device)
    for _, (call, target) in zip(range(STEPS), watch.handing_out(example(given, batch, device)), strict=False):
        (call(module) - target).square().mean().backward()
    return watch.least()


def learnt(
    module: nn.Module,
    given: Examples,
    batch: int,
    device: torch.device,
    learner: Learner,
    adam: Callable[..., Optimizer] = ADAM,
) -> float:
    """Seconds of a step."""
    layers = policy.quantize_weights_(module, policy.assign(policy.layers(module), GROUPS))
    for layer in layers.values():
        layer.prepare()
    watch = Stopwatch(device)
    fit = Learnt(learner, adam, Relative(), STEPS, batch, precision="bf16-mixed")
    fit(module, list(layers.values()), given, Trainers(partial(trainer(device), callbacks=[watch])))
    return watch.least()


def reference(module: nn.Module, given: Examples, batch: int, device: torch.device) -> float:
    """Seconds of a step."""
    watch = Stopwatch(device)
    plain.fit(module, plain.round_(module), watch.handing_out(example(given, batch, device)), STEPS)
    return watch.least()


PARTS: dict[str, Callable[[nn.Module, Examples, int, torch.device], float]] = {
    "forward and backward": bare,
    "AdaRound": partial(learnt, learner=logit),
    "AdaRound, Adam in many passes": partial(learnt, learner=logit, adam=partial(torch.optim.Adam, lr=1e-2)),
    "scale-aware AdaRound": partial(learnt, learner=ulp),
    "plain reference": reference,
}


def measure(part: str, width: int, tokens: int, batch: int, device: torch.device = CPU) -> tuple[float, float]:
    """Seconds of a step, and how many MiB it takes more than there were before it."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    module = block(width).to(device)
    given = examples(module, width, tokens, batch, device)
    start = peak(device)
    seconds = PARTS[part](module, given, batch, device)
    return seconds, peak(device) - start


def main(sizes: list[tuple[int, ...]]) -> None:
    for width, tokens, batch in sizes:
        print(f"a block of width {width}, {batch} x {tokens} tokens, one core")
        # A process for each, for the peak of one only ever rises.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            found = pool.map(measure, PARTS, repeat(width), repeat(tokens), repeat(batch))
            for part, (seconds, more) in zip(PARTS, found, strict=True):
                print(f"  {part:30} {1000 * seconds:8.0f} ms a step, {more:6.0f} MiB more than before it", flush=True)


if __name__ == "__main__":
    given = tuple(map(int, sys.argv[1:]))
    main([given] if given else SIZES)
