"""Choose static activation scalings, and measure what each activation loses at each timestep."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp4dit.errors import UserError
from fp4dit.layer import Activation
from fp4dit.models.base import Pipeline
from fp4dit.policy import Entry, Rule
from fp4dit.scales import from_parts, parts
from fp4dit.stream import State, answers

Hook = Callable[[str, Tensor, Tensor], Tensor | None]  # name, given, answered -> the answer to use instead


@contextmanager
def hooked(activations: Mapping[str, Activation], hook: Hook) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in activations.items():
            handle = module.register_forward_hook(lambda _m, given, out, name=name: hook(name, given[0], out))  # pyright: ignore[reportArgumentType]
            stack.callback(handle.remove)
        yield


def sample(x: Float[Tensor, "..."], count: int) -> Float[Tensor, "c"]:
    """About `count` values, evenly spaced in memory, and the two extremes."""
    flat = x.flatten()
    return torch.cat([flat[:: max(1, len(flat) // count)], flat.min()[None], flat.max()[None]]).float().cpu()


class Replay(L.LightningModule):
    """Replays captured calls, unit by unit, and shows a hook every activation on its way."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Activation]) -> None:
        super().__init__()
        self.pipeline, self.activations = pipeline, activations

    def test_step(self, state: State) -> None:
        self.pipeline.to(self.device)
        timestep = float(state["timestep"][0])
        with hooked(self.activations, lambda name, x, out: self.see(name, timestep, x, out)):
            for unit in self.pipeline.units():
                module = self.pipeline.dit.get_submodule(unit.module)
                state = state | dict(zip(unit.answer, answers(unit.call(state)(module)), strict=True))

    def see(self, name: str, timestep: float, x: Tensor, out: Tensor) -> Tensor | None:
        """The answer to go on with, or None for the one that was given."""
        ...


class Observe(Replay):
    """Collects values of unquantized activations; `fix` then makes them static."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Activation], counts: Mapping[str, int]) -> None:
        super().__init__(pipeline, {name: activations[name] for name in counts})
        self.counts, self.seen = counts, defaultdict(list)

    def see(self, name: str, timestep: float, x: Tensor, out: Tensor) -> Tensor:
        self.seen[name].append(sample(x, self.counts[name]))
        return x

    def fix(self) -> None:
        for name, module in self.activations.items():
            values = torch.cat(self.seen[name]).to(self.pipeline.device)
            module.scaling = module.quantizer.scaling(values)


class Measure(Replay):
    """Signal-to-quantization-noise ratio of every activation at every timestep, in dB."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Activation]) -> None:
        super().__init__(pipeline, activations)
        self.power: dict[tuple[str, float], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self.shapes: dict[str, torch.Size] = {}

    def see(self, name: str, timestep: float, x: Tensor, out: Tensor) -> None:
        noise = (out.double() - x.double()).square().sum()
        power = torch.stack([x.double().square().sum(), noise]).cpu()
        if not power.isfinite().all():
            raise UserError(
                f"the input of {name} holds NaN or infinity at timestep {timestep:g}: try model.dtype=float32"
            )
        self.power[name, timestep] += power
        self.shapes[name] = x.shape

    def sqnr(self) -> list[dict[str, str | float]]:
        def decibel(signal: float, noise: float) -> float:
            return 10 * torch.log10(torch.tensor(signal / noise)).item() if noise else float("inf")

        return [
            {"layer": name, "timestep": timestep, "sqnr_db": round(decibel(*power.tolist()), 3)}
            for (name, timestep), power in self.power.items()
        ]

    def audit(self, rules: Mapping[str, Rule]) -> list[Entry]:
        return [
            Entry(
                name,
                rules[name].match,
                module.quantizer.format.name,
                self.bits(name, module),
                self.shapes[name].numel(),
            )
            for name, module in self.activations.items()
        ]

    def bits(self, name: str, module: Activation) -> float:
        """Scales counted where they are made anew for each call; a static one costs nothing."""
        quantizer = module.quantizer
        return quantizer.bits(self.shapes[name]) if module.scaling is None else float(quantizer.format.bits)


def save_scales(activations: Mapping[str, Activation], path: Path) -> None:
    """The static scalings; none for what is online."""
    tensors = {
        f"{name}.{part}": value.contiguous()
        for name, module in activations.items()
        if module.scaling is not None
        for part, value in parts(module.scaling).items()
    }
    save_file(tensors, path)


def load_scales_(activations: Mapping[str, Activation], path: Path) -> None:
    tensors = load_file(path)
    for name, module in activations.items():
        found = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.rpartition(".")[0] == name}
        module.scaling = from_parts(found) if found else None
