"""Rough estimates of the time, memory and disk space of stages, from shapes and measured speeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp4dit.estimate.footprint import ModelFootprint
from fp4dit.estimate.machine import Machine, measure_quantize_seconds
from fp4dit.estimate.rounding import estimate_unit_cost
from fp4dit.quantization.audit import audit_activation_shapes as audit_activation_shapes
from fp4dit.quantization.rules import Rule, match_rules
from fp4dit.rounding.base import RoundingMethod

# The speed of models as a share of the speed of a large matmul. On a machine with 100 GFLOP/s, the
# stages of the shipped model ran at 57 to 70 GFLOP/s, by the manifests of the fastest runs: 17.5 s
# to capture 32 prompts, 31 to 34 s for both passes over these calls, another 155 s to learn 250
# steps per unit, and 28 to 35 s to generate 64 images.
MODEL_SPEED_SHARE = 0.6

# The inputs of a captured call that change from step to step. All others are written once.
CHANGING_INPUTS = ("latent", "timestep")

# The bytes of an image per number of its latent. A latent has 4 numbers for 8 x 8 pixels of 3 bytes
# each.
IMAGE_BYTES_PER_LATENT = 48


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage.

    Attributes:
        seconds: The time.
        device_bytes: The device's memory; 0 if the device is the host.
        host_bytes: The host's memory.
        disk_bytes: The disk space.
        memory_option: The config option to reduce if the memory is too small.
        data_bytes: The size of the calibration data, in memory or in files.
    """

    seconds: float
    device_bytes: int | float
    host_bytes: int | float
    disk_bytes: int
    memory_option: str
    data_bytes: int = 0


def count_calls(prompts: int, steps: int, guidance: float) -> int:
    """Count the samples that the transformer computes: with guidance above 1, two per prompt."""
    return prompts * steps * (2 if guidance > 1 else 1)


@dataclass(frozen=True)
class Estimator:
    """Estimates the cost of stages for one model on one device.

    The estimates do not include text encoders and autoencoders, transforms, searches of scales,
    copies of weights for timestep ranges, and the time to read and write files.

    Args:
        footprint: The resources of one sample in the model.
        machine: The machine.
        budget: The bytes of the host's memory for calibration data.
        dtype: The data type of the model.

    Example:
        >>> estimator = Estimator(measure_footprint(skeleton), machine, 8e9, torch.float16)
        >>> estimator.estimate_sampling(8, 20, 4.5, 8, [], 0, "generation.batch_size").seconds
        12.3
    """

    footprint: ModelFootprint
    machine: Machine
    budget: int | float
    dtype: torch.dtype

    def estimate_sampling(
        self,
        prompts: int,
        steps: int,
        guidance: float,
        batch_size: int,
        activation: Sequence[Rule],
        disk_bytes: int,
        memory_option: str,
    ) -> StageCost:
        """Estimate the sampling of images.

        Args:
            prompts: The number of images.
            steps: The number of sampling steps.
            guidance: The scale of classifier-free guidance.
            batch_size: The number of images that are sampled together.
            activation: The rules for activations.
            disk_bytes: The size of the stage's files.
            memory_option: The config option to reduce if the memory is too small.
        """
        per_call = self.forward_seconds + self.estimate_quantize_seconds(activation)
        seconds = count_calls(prompts, steps, guidance) * per_call
        working_bytes = count_calls(batch_size, 1, guidance) * self.footprint.peak_bytes
        return self.make_cost(seconds, working_bytes, disk_bytes, memory_option)

    def estimate_replay(
        self,
        num_plain: int,
        num_measured: int,
        batch_size: int,
        activation: Sequence[Rule],
        memory_option: str,
    ) -> StageCost:
        """Estimate replaying captured calls.

        Args:
            num_plain: The number of calls with activations in full precision.
            num_measured: The number of calls with quantized activations.
            batch_size: The number of calls of a pass.
            activation: The rules for activations.
            memory_option: The config option to reduce if the memory is too small.
        """
        seconds = (num_plain + num_measured) * self.forward_seconds
        seconds += num_measured * self.estimate_quantize_seconds(activation)
        return self.make_cost(seconds, batch_size * self.footprint.peak_bytes, 0, memory_option)

    def estimate_reconstruction(
        self,
        num_train: int,
        num_val: int,
        batch_size: int,
        method: RoundingMethod,
        activation: Sequence[Rule],
        memory_option: str,
    ) -> StageCost:
        """Estimate propagating both models over all calls, and rounding each unit.

        Args:
            num_train: The number of calls to learn from.
            num_val: The number of calls to measure on.
            batch_size: The number of calls of a pass.
            method: The rounding method.
            activation: The rules for activations while weights are rounded.
            memory_option: The config option to reduce if the memory is too small.
        """
        num_rows, footprint = num_train + num_val, self.footprint
        costs = []
        for unit in footprint.units:
            if unit.layers:
                costs.append(estimate_unit_cost(method, unit, num_train))
        per_row = 2 * self.forward_seconds + self.estimate_quantize_seconds(activation)
        seconds = num_rows * per_row + sum(cost.flops for cost in costs) / self.flops_per_second
        working_bytes = max([batch_size * footprint.peak_bytes, *(cost.bytes for cost in costs)])
        stream_bytes = num_rows * self.count_stream_bytes()
        data_bytes = num_rows * sum(footprint.input_bytes.values()) + stream_bytes
        disk_bytes = footprint.parameter_bytes
        if data_bytes > self.budget:
            disk_bytes += stream_bytes
        return self.make_cost(seconds, working_bytes, disk_bytes, memory_option, data_bytes)

    def count_stream_bytes(self) -> int:
        """Return the peak bytes per row of the activations of both models.

        An activation exists until the last unit that reads it.
        """
        live_bytes: dict[str, int] = {}
        peak, units = 0, self.footprint.units
        for number, unit in enumerate(units, 1):
            peak = max(peak, sum(live_bytes.values()) + sum(unit.output_bytes.values()))
            read_later = {name for other in units[number:] for name in other.inputs}
            sizes = {**live_bytes, **unit.output_bytes}
            live_bytes = {name: size for name, size in sizes.items() if name in read_later}
        return 2 * peak

    def count_capture_bytes(self, prompts: int, steps: int, guidance: float) -> int:
        """Return the size of the files of captured calls."""
        sizes = self.footprint.input_bytes
        changing = sum(sizes[name] for name in CHANGING_INPUTS)
        constant = sum(sizes.values()) - changing
        return count_calls(prompts, 1, guidance) * (steps * changing + constant)

    def count_image_bytes(self, count: int) -> int:
        """Return the size of images before compression."""
        latent_bytes = self.footprint.input_bytes["latent"]
        return count * IMAGE_BYTES_PER_LATENT * latent_bytes // self.dtype.itemsize

    @property
    def flops_per_second(self) -> float:
        """The speed at which models run on this machine."""
        return MODEL_SPEED_SHARE * self.machine.flops_per_second

    @property
    def forward_seconds(self) -> float:
        """The seconds of a forward pass of one sample."""
        return self.footprint.flops / self.flops_per_second

    def estimate_quantize_seconds(self, rules: Sequence[Rule]) -> float:
        """Return the seconds to quantize all activations of a sample.

        The quantizer of each rule is timed on the largest activation that the rule applies to.
        """
        shapes = self.footprint.activation_shapes
        matches, total = match_rules(shapes, rules), 0.0
        for rule in rules:
            rule_shapes = [shapes[name] for name, match in matches.items() if match is rule]
            if rule.quantizer and rule_shapes:
                largest = max(rule_shapes, key=torch.Size.numel)
                per_value = measure_quantize_seconds(rule, largest, self.machine.device, self.dtype)
                total += per_value * sum(shape.numel() for shape in rule_shapes)
        return total

    def make_cost(
        self,
        seconds: float,
        working_bytes: int,
        disk_bytes: int,
        memory_option: str,
        data_bytes: int = 0,
    ) -> StageCost:
        """Return the cost of a stage.

        Args:
            seconds: The time.
            working_bytes: The memory of the computation, besides the weights.
            disk_bytes: The size of the stage's files.
            memory_option: The config option to reduce if the memory is too small.
            data_bytes: The size of the calibration data.
        """
        weights, data = self.footprint.parameter_bytes, min(data_bytes, self.budget)
        device_bytes, host_bytes = weights + working_bytes, weights + data
        if self.machine.device_bytes is None:
            device_bytes, host_bytes = 0, weights + working_bytes + data
        return StageCost(seconds, device_bytes, host_bytes, disk_bytes, memory_option, data_bytes)
