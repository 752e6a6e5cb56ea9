"""Linear layers trained in few bits beside a plain one in bf16: `python -m benchmarks.training`.

PixArt's shapes and 1024 tokens, random data, weights in bf16; on a GPU if there is one, else on one core. All layers
take turns in one run, and of the repeats medians count. `kept` is what the forward pass keeps for the backward pass,
`peak` what a forward and a backward pass take beyond what was there before: gradients, and all that lies in between. It
writes outputs/benchmarks/training.md. Where there is no hardware for FP4, and the first line tells, what is measured is
what emulating it costs; on a GPU with the fused projections and without. At the end, the passes of a whole model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.adaround import CPU, peak
from benchmarks.gpu import alone
from benchmarks.markdown import head, row
from benchmarks.timing import in_turn, medians, resident
from fp4dit.models.shapes.data import Batch, Scenes
from fp4dit.models.shapes.recipe import transformer
from fp4dit.packed.speeds import device_name
from fp4dit.tasks.pretrain import DenoisingTask
from fp4dit.training import kernels, scaled
from fp4dit.training.layer import TrainRule, train_in_few_bits
from fp4dit.training.product import Recipe
from fp4dit.training.projections import absmax, mxfp8, nvfp4

UNFUSED = "Quartet, projections not fused"  # on a GPU; elsewhere none are
OUT = Path("outputs/benchmarks/training.md")
PLAIN = "plain, bf16"
RECIPES = {
    "Quartet": Recipe(),
    "Quartet, plain gradients": Recipe(backward=None),
    "MXFP8": Recipe(mxfp8(), mxfp8()),
    "MXFP4, stochastic gradients": Recipe(absmax(), absmax(stochastic=True)),
    "NVFP4, MXFP4 gradients": Recipe(nvfp4()),
}


@dataclass(frozen=True)
class Sizes:
    """`shapes` are of weights, o x k."""

    shapes: Sequence[tuple[int, int]] = ((1152, 1152), (4608, 1152), (1152, 4608))
    tokens: int = 1024
    repeats: int = 5
    calls: int = 1
    scenes: int = 8
    layers: int = 6


def names(device: torch.device) -> list[str]:
    return [PLAIN, *RECIPES, *([UNFUSED] if device.type == "cuda" else [])]


def recipe(name: str) -> Recipe:
    return RECIPES["Quartet" if name == UNFUSED else name]


def layer(name: str, o: int, k: int, device: torch.device) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(k, o, device=device, dtype=torch.bfloat16)
    return plain if name == PLAIN else train_in_few_bits(plain, recipe(name))


def fused(name: str) -> Any:
    """What a layer of this name is to be called in."""
    return patch.object(kernels, "settings", lambda way: None) if name == UNFUSED else nullcontext()


def both(module: nn.Linear, x: Tensor, slope: Tensor) -> None:
    """A forward and a backward pass."""
    module.zero_grad(set_to_none=True)
    torch.autograd.grad(module(x), [x, *module.parameters()], slope)


def operands(o: int, k: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    make = lambda width: torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    return make(k).requires_grad_(), make(o)


def times(sizes: Sizes, o: int, k: int, device: torch.device) -> Mapping[str, tuple[float, float]]:
    """Milliseconds forwards, and backwards: of both together what is left."""
    x, slope = operands(o, k, sizes.tokens, device)
    layers = {name: layer(name, o, k, device) for name in names(device)}

    def called(name: str, run: Callable[[nn.Linear], Any]) -> None:
        with fused(name):
            run(layers[name])

    ways = {(name, "forward"): partial(called, name, lambda module: module(x)) for name in layers}
    ways |= {(name, "both"): partial(called, name, lambda module: both(module, x, slope)) for name in layers}
    found = medians(in_turn(ways, sizes.repeats, device, sizes.calls))  # pyright: ignore[reportArgumentType]
    return {name: (found[name, "forward"], found[name, "both"] - found[name, "forward"]) for name in layers}  # pyright: ignore[reportArgumentType]


def memory(name: str, o: int, k: int, tokens: int, device: torch.device) -> tuple[float, float]:
    """MiB kept, and at the peak. A process of its own, for the peak of one only ever rises."""
    torch.set_num_threads(1)
    now = peak if device.type == "cuda" else lambda _: resident()
    x, slope = operands(8, 8, 64, device)
    both(layer(name, 8, 8, device), x, slope)  # what is loaded at the first call
    x, slope = operands(o, k, tokens, device)
    module = layer(name, o, k, device)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = now(device)
    with saved_tensors_hooks(note, lambda tensor: tensor), fused(name):
        both(module, x, slope)
    for p in module.parameters():  # which are there anyway
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / 2**20, now(device) - before


def table(sizes: Sizes, device: torch.device, run: Callable[..., Any] = alone) -> Iterator[str]:
    """Lines of Markdown."""
    why = scaled.refusal(device)
    how = f"emulated: {why}" if why else "block-scaled"
    yield f"{device_name(device)}, torch {torch.__version__}, {sizes.tokens} tokens; MXFP4 products {how}"
    yield ""
    columns = ("forward, ms", "of plain", "backward, ms", "of plain", "kept, MiB", "peak, MiB")
    yield from head("o x k, layer", *columns)
    for o, k in sizes.shapes:
        found = times(sizes, o, k, device)
        for name, pair in found.items():
            cells = [
                cell
                for ms, plain in zip(pair, found[PLAIN], strict=True)
                for cell in (f"{ms:.2f}", f"{ms / plain:.1f}")
            ]
            kept, most = run(memory, name, o, k, sizes.tokens, device)
            yield row(f"{o} x {k}, {name}", *cells, f"{kept:.1f}", f"{most:.1f}")


def step(task: DenoisingTask, batch: Batch, device: torch.device) -> None:
    """The forward and the backward pass of a step; optimizers are the same for all."""
    task.zero_grad()
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        task.loss(task.transformer, batch).backward()


def model(sizes: Sizes, device: torch.device) -> Iterator[str]:
    """Lines of Markdown: passes of the shapes model, whose blocks train in few bits."""
    batch = next(iter(Scenes(sizes.scenes)))
    batch = batch._replace(pictures=batch.pictures.to(device))
    settings: Any = {"lr": 0.0, "muon_lr": 0.0, "levels": 2, "drop": 0.0, "decay": 0.9, "further": False}

    def task(name: str) -> DenoisingTask:
        rules = [] if name == PLAIN else [TrainRule("transformer_blocks.*", recipe(name))]
        return transformer(1, layers=sizes.layers, linear=rules, **settings).to(device)

    tasks = {name: task(name) for name in names(device)}

    def called(name: str) -> None:
        with fused(name):
            step(tasks[name], batch, device)

    found = medians(in_turn({name: partial(called, name) for name in tasks}, sizes.repeats, device))
    yield from head(f"the shapes model, {sizes.scenes} scenes at 2 noise levels", "ms", "of plain")
    for name, ms in found.items():
        yield row(name, f"{ms:.0f}", f"{ms / found[PLAIN]:.1f}")


def main(sizes: Sizes, device: torch.device, out: Path = OUT, run: Callable[..., Any] = alone) -> None:
    torch.set_num_threads(1)
    lines = []
    for text in chain(table(sizes, device, run), [""], model(sizes, device)):
        print(text, flush=True)
        lines.append(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    main(Sizes(calls=20) if gpu else Sizes(), torch.device("cuda") if gpu else CPU)
