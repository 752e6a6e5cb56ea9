"""Choose static activation scalings, and measure what each activation loses at each timestep."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp4dit.clock import tell
from fp4dit.errors import UserError
from fp4dit.grid import Grid, TimedGrid
from fp4dit.models.base import Pipeline
from fp4dit.policy import Entry, Rule
from fp4dit.stream import State, answers
from fp4dit.tensors import save_tensors

Hook = Callable[[str, Tensor, Tensor], Tensor | None]  # name, given, answered -> the answer to use instead


@contextmanager
def hooked(activations: Mapping[str, Grid], hook: Hook) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in activations.items():
            handle = module.register_forward_hook(lambda _m, given, out, name=name: hook(name, given[0], out))  # pyright: ignore[reportArgumentType]
            stack.callback(handle.remove)
        yield


class Replay(L.LightningModule):
    """Replays captured calls, unit by unit, and shows a hook every activation on its way."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Grid]) -> None:
        super().__init__()
        self.pipeline, self.activations = pipeline, activations

    def test_step(self, state: State) -> None:
        self.pipeline.to(self.device)
        timestep = float(state["timestep"][0])
        tell(self.pipeline.dit, state["timestep"])
        with hooked(self.activations, lambda name, x, out: self.see(name, timestep, x, out)):
            for unit in self.pipeline.units():
                module = self.pipeline.dit.get_submodule(unit.module)
                state = state | dict(zip(unit.answer, answers(unit.call(state)(module)), strict=True))

    def see(self, name: str, timestep: float, x: Tensor, out: Tensor) -> Tensor | None:
        """The answer to go on with, or None for the one that was given."""
        ...


class Observe(Replay):
    """Notes what unquantized activations are like; `fix` then makes them static."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Grid], rules: Mapping[str, Rule]) -> None:
        super().__init__(pipeline, {name: activations[name] for name in rules})
        self.rules = rules
        self.notes: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in rules}

    def see(self, name: str, timestep: float, x: Tensor, out: Tensor) -> Tensor:
        observer = self.rules[name].observe
        assert observer is not None
        self.notes[name].append((timestep, observer.note(x)))
        return x

    def fix(self) -> None:
        """Raises UserError if the model never read an activation that is to be static."""
        check_read([name for name in self.rules if not self.notes[name]])
        for name, grid in self.activations.items():
            if isinstance(grid, TimedGrid):
                timesteps = dict.fromkeys(timestep for timestep, _ in self.notes[name])
                grid.measure_at({timestep: self.gathered(name, timestep) for timestep in timesteps})
            else:
                grid.measure(self.gathered(name))

    def gathered(self, name: str, timestep: float | None = None) -> Tensor:
        observer = self.rules[name].observe
        assert observer is not None
        notes = [note for at, note in self.notes[name] if timestep in (None, at)]
        return observer.gather(notes).to(self.pipeline.device)


class Measure(Replay):
    """Signal-to-quantization-noise ratio of every activation at every timestep, in dB."""

    def __init__(self, pipeline: Pipeline, activations: Mapping[str, Grid]) -> None:
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
        """Raises UserError if the model never read an activation that was to be quantized."""
        check_read([name for name in self.activations if name not in self.shapes])
        return [
            Entry(
                name,
                rules[name].match,
                (module.format if module.held() else module.quantizer.format).name,
                self.bits(name, module),
                self.shapes[name].numel(),
            )
            for name, module in self.activations.items()
        ]

    def bits(self, name: str, module: Grid) -> float:
        """Scales counted where they are made anew for each call; a static one costs nothing."""
        quantizer = module.quantizer
        return quantizer.bits(self.shapes[name]) if module.scaling is None else float(quantizer.format.bits)


def check_read(unread: Sequence[str]) -> None:
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise UserError(
            f"{', '.join(unread[:3])}{more} would not be quantized: the model never reads them, or not by way of "
            f"F.scaled_dot_product_attention. To leave them as they are: +activation.leave=['{unread[0]}'], where "
            "wildcards are understood"
        )


def save_scales(activations: Mapping[str, Grid], path: Path) -> None:
    """What was measured; nothing for what is online."""
    save_tensors(
        {f"{name}.{key}": v for name, grid in activations.items() for key, v in grid.state_dict().items()}, path
    )


def load_scales_(activations: Mapping[str, Grid], path: Path) -> None:
    tensors = load_file(path)
    for name, grid in activations.items():
        grid.load_state_dict(
            {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.rpartition(".")[0] == name}
        )
        if grid.static and grid.scaling is None:
            raise UserError(f"{path} holds no scale for the static activation {name}")
