"""What the stages of an experiment will take: rough, for it is computed from shapes and the speeds of few things."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fp4dit import policy
from fp4dit.footprint import Footprint
from fp4dit.machine import Machine, quantizing
from fp4dit.policy import Entry, Rule
from fp4dit.tasks.reconstruct import Fit, fit_work

# Of what a product of matrices does per second, the share that models do. Where that is 100 GFLOP/s, the stages of the
# shipped model had run at 57 to 70, by the manifests of the fastest: 17.5 s to capture 32 prompts, 31 to 34 s for both
# passes over these calls, 155 s more to learn 250 steps per unit, 28 to 35 s to draw 64 images.
SHARE = 0.6
CHANGING = ("latent", "timestep")  # of what a call is given; all else is the same at every step, and written once
IMAGE = 48  # bytes for each number of a latent: 3 for each of 8 x 8 pixels, which share 4 numbers


@dataclass(frozen=True)
class Cost:
    """What a stage takes: seconds; bytes of the device, if it has memory of its own, of the host's memory, and of the
    disk. `data` is how large calibration data get, in memory or not; `lower` the option that memory depends on."""

    seconds: float
    device: int | float
    host: int | float
    disk: int
    lower: str
    data: int = 0


def calls(prompts: int, steps: int, guidance: float) -> int:
    """Samples that a transformer is asked for: guidance beyond 1 asks twice for each prompt."""
    return prompts * steps * (2 if guidance > 1 else 1)


def activations(seen: Mapping[str, torch.Size], rules: Sequence[Rule]) -> list[Entry]:
    """The audit of activations that are seen in these shapes, as far as they are quantized."""
    return [
        Entry(name, rule.match, rule.quantizer.format.name, bits(rule, seen[name]), seen[name].numel())
        for name, rule in policy.matched(seen, rules).items()
        if rule.quantizer
    ]


def bits(rule: Rule, shape: torch.Size) -> float:
    assert rule.quantizer is not None
    return float(rule.quantizer.format.bits) if rule.observe else rule.quantizer.bits(shape)


@dataclass(frozen=True)
class Estimator:
    """For a model on one device of a machine, with `budget` bytes of the host's memory for calibration data.

    Not counted: text encoders and autoencoders, transforms, scales that are searched, copies of weights for ranges of
    timesteps, and waiting for files.
    """

    footprint: Footprint
    machine: Machine
    budget: int | float
    dtype: torch.dtype

    def sampling(
        self, prompts: int, steps: int, guidance: float, chunk: int, activation: Sequence[Rule], disk: int, lower: str
    ) -> Cost:
        """Prompts denoised `chunk` at a time."""
        seconds = calls(prompts, steps, guidance) * (self.forward + self.quantizing(activation))
        return self.cost(seconds, calls(chunk, 1, guidance) * self.footprint.widest, disk, lower)

    def replay(self, observed: int, measured: int, at_once: int, activation: Sequence[Rule], lower: str) -> Cost:
        """Captured calls given to the model again, to observe activations and to measure what quantizing them loses."""
        seconds = (observed + measured) * self.forward + measured * self.quantizing(activation)
        return self.cost(seconds, at_once * self.footprint.widest, 0, lower)

    def reconstruction(
        self, trained: int, held_out: int, at_once: int, fit: Fit, activation: Sequence[Rule], lower: str
    ) -> Cost:
        """Both models advanced over all rows, and each unit fitted to those to be `trained` on."""
        rows, own = trained + held_out, self.footprint
        work = [fit_work(fit, one, trained) for one in own.passes if one.layers]
        passes = rows * (2 * self.forward + self.quantizing(activation))
        working = max([at_once * own.widest, *(one.bytes for one in work)])
        given, made = rows * sum(own.given.values()), rows * self.both_streams()
        spilled = made if given + made > self.budget else 0
        seconds = passes + sum(one.flops for one in work) / self.speed
        return self.cost(seconds, working, own.parameters + spilled, lower, given + made)

    def both_streams(self) -> int:
        """Bytes a row of what units leave, where that is most: a column stays as long as a later unit reads it."""
        alive: dict[str, int] = {}
        most, passes = 0, self.footprint.passes
        for number, one in enumerate(passes, 1):
            most = max(most, sum(alive.values()) + sum(one.left.values()))
            later = {name for other in passes[number:] for name in other.reads}
            alive = {name: size for name, size in {**alive, **one.left}.items() if name in later}
        return 2 * most

    def captured(self, prompts: int, steps: int, guidance: float) -> int:
        """Bytes of a capture's files."""
        given = self.footprint.given
        changing = sum(given[name] for name in CHANGING)
        return calls(prompts, 1, guidance) * (steps * changing + sum(given.values()) - changing)

    def images(self, count: int) -> int:
        """Bytes of images as they are before PNG compresses them."""
        return count * IMAGE * self.footprint.given["latent"] // self.dtype.itemsize

    @property
    def speed(self) -> float:
        return SHARE * self.machine.speed

    @property
    def forward(self) -> float:
        """Seconds for a sample."""
        return self.footprint.flops / self.speed

    def quantizing(self, rules: Sequence[Rule]) -> float:
        """Seconds for all activations of a sample: each rule is timed on the largest that it gets."""
        chosen, total = policy.matched(self.footprint.seen, rules), 0.0
        for rule in rules:
            shapes = [self.footprint.seen[name] for name, its in chosen.items() if its is rule]
            if rule.quantizer and shapes:
                largest = max(shapes, key=torch.Size.numel)
                each = quantizing(rule, largest, self.machine.device, self.dtype)
                total += each * sum(shape.numel() for shape in shapes)
        return total

    def cost(self, seconds: float, working: int, disk: int, lower: str, data: int = 0) -> Cost:
        """`working` is where the model computes, beside its weights."""
        weights, kept = self.footprint.parameters, min(data, self.budget)
        if self.machine.own is None:
            return Cost(seconds, 0, weights + working + kept, disk, lower, data)
        return Cost(seconds, weights + working, weights + kept, disk, lower, data)
