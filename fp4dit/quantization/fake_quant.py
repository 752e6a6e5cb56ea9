"""Fake quantization as a module: a quantizer and the qparams that were calibrated for it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams, as_tensors, from_tensors
from fp4dit.numerics.quantizer import Quantizer
from fp4dit.numerics.rounding import RoundingFunction, round_to_nearest
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.utils.modules import DtypePreservingModule


class FakeQuantize(DtypePreservingModule):
    """Fake-quantize a tensor, with dynamic or with calibrated qparams.

    A dynamic module (`static=False`) computes new qparams from each tensor that flows through it.
    A static one uses those that `calibrate` computed. Until then it returns its input unchanged.
    The qparams are buffers, so that they are saved with the model.

    Args:
        quantizer: Format, granularity and scale rule.
        static: Require calibration instead of computing qparams dynamically.

    Example:
        >>> int8 = Quantizer(integer(8), PerTensor())
        >>> fake_quantize = FakeQuantize(int8, static=True)
        >>> fake_quantize.calibrate(torch.randn(64, 32))
        >>> y = fake_quantize(torch.randn(2, 32))
    """

    def __init__(self, quantizer: Quantizer, static: bool = False) -> None:
        super().__init__()
        self.quantizer, self.static = quantizer, static

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "..."], importance: Blocks | None = None) -> None:
        """Compute and keep the qparams for `x`, and its format if the format is selected from data.

        Args:
            x: Weight, or sample of activations.
            importance: Weight of each value's error, for scale rules that minimize an error.
        """
        blocks = self.quantizer.granularity.split(x).float()
        if isinstance(self.quantizer.format, FormatSelection):
            # "choice" is the name of the format index in the files of stored results.
            self.register_buffer(
                "choice", self.quantizer.format.select_formats(blocks, self.quantizer.scale)
            )
        self.set_qparams(self.quantizer.scale(blocks, self.format, importance))

    def set_qparams(self, qparams: QParams) -> None:
        """Keep the tensors of these qparams as buffers."""
        for name, value in as_tensors(qparams).items():
            self.register_buffer(name, value)

    @property
    def format(self) -> Format:
        """Number format of the values.

        Raises:
            KeyError: If the format is selected from data and the module is not calibrated.
        """
        fmt = self.quantizer.format
        return (
            fmt.format_at(self.calibrated_tensors()["choice"])
            if isinstance(fmt, FormatSelection)
            else fmt
        )

    @property
    def qparams(self) -> QParams | None:
        """Calibrated qparams; None before calibration, and for a dynamic module."""
        tensors = self.calibrated_tensors()
        tensors.pop("choice", None)
        return from_tensors(tensors) if tensors else None

    def calibrated_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the qparams and of the format selection, by name."""
        return dict(self.named_buffers())

    def forward(
        self, x: Float[Tensor, "..."], rounding: RoundingFunction = round_to_nearest
    ) -> Float[Tensor, "..."]:
        qparams = self.qparams
        if qparams is None:
            return x if self.static else self.quantizer.resolve_format(x)(x, rounding=rounding)
        quantizer = self.quantizer
        # torch.compile cannot trace `replace`, so it is not called for a fixed format.
        if isinstance(quantizer.format, FormatSelection):
            quantizer = replace(quantizer, format=self.format)
        return quantizer(x, qparams, rounding)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # The names and shapes of the buffers depend on the class of the qparams and on the format,
        # so the buffers are registered as the state dict has them.
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key.removeprefix(prefix), torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TimestepFakeQuantize(FakeQuantize):
    """Static fake quantization with separate qparams for each timestep.

    At a timestep that was not calibrated, it uses the qparams of the nearest calibrated timestep.
    All rows of a batch use the qparams for the timestep of the first row.

    Args:
        quantizer: Format, granularity and scale rule.
        context: Context that holds the current timestep.

    Example:
        >>> context = TimestepContext()
        >>> fake_quantize = TimestepFakeQuantize(int8, context)
        >>> fake_quantize.calibrate_per_timestep({900.0: early, 100.0: late})
        >>> context.update(torch.tensor(880))
        >>> y = fake_quantize(x)  # with the qparams of timestep 900
    """

    def __init__(self, quantizer: Quantizer, context: TimestepContext) -> None:
        super().__init__(quantizer, static=True)
        self.context = context

    def calibrate_per_timestep(self, samples: Mapping[float, Tensor]) -> None:
        """Compute and keep the qparams of each timestep.

        Args:
            samples: Sample of activations by timestep.
        """
        per_timestep: list[dict[str, Tensor]] = []
        for x in samples.values():
            fake_quantize = FakeQuantize(self.quantizer)
            fake_quantize.calibrate(x)
            per_timestep.append(fake_quantize.calibrated_tensors())
        for name, first in per_timestep[0].items():
            self.register_buffer(name, torch.stack([tensors[name] for tensors in per_timestep]))
            self.register_buffer("timesteps", torch.tensor(list(samples), device=first.device))

    def calibrated_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the calibrated timestep nearest to the current one, by name."""
        tensors = super().calibrated_tensors()
        timesteps = tensors.pop("timesteps", None)
        if timesteps is None:
            return tensors
        index = (timesteps - self.context.timestep[0]).abs().argmin()
        return {name: value[index] for name, value in tensors.items()}


def candidate_formats(quantizer: Quantizer) -> list[Format]:
    """Return the formats that a quantizer can use: one, unless the format is selected from data."""
    fmt = quantizer.format
    return list(fmt.formats) if isinstance(fmt, FormatSelection) else [fmt]
