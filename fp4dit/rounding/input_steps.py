"""Learned steps of static inputs (LSQ, arXiv:1902.08153), with the weights or after them.

PTQ4DiT (arXiv:2405.16005) learns them together with the roundings of the weights, Q-Diffusion
(arXiv:2302.04304) in a second stage after these.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams, as_tensors, from_tensors
from fp4dit.numerics.quantizer import Granularity, PerInputChannel, PerTensor
from fp4dit.numerics.scale_search import PreShift
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.learnable_rounding import LearnableRounding
from fp4dit.rounding.signround import clip_to_range
from fp4dit.rounding.straight_through import straight_through
from fp4dit.utils.errors import UserError

SMALLEST_SHARE = 2.0**-10  # of the calibrated step, so that a step stays positive


class LearnedStep(nn.Module):
    """Fake quantization whose scale is a parameter (LSQ, arXiv:1902.08153).

    The gradient passes the rounding straight through and stops where a value is clipped. With
    v = x / s + z, the gradient of the output with respect to the scale s is therefore
    round(v) - v, and q - z for a value that is clipped to the end q. A value within half a step
    of an end counts as rounded to it, as in the code of Q-Diffusion, and not as clipped. The zero
    point z, or the offset, stays as it is.

    Args:
        fmt: Number format.
        granularity: One scale for the tensor, or a row of scales.
        qparams: Calibrated qparams, whose `scale` is learned. Places of a row with the same scale
            share the learned one.

    Example:
        >>> step = LearnedStep(integer(8, signed=False), PerTensor(), qparams)
        >>> step(x).sum().backward()
        >>> step.scale.grad
    """

    places: Tensor
    smallest: Tensor

    def __init__(self, fmt: Format, granularity: Granularity, qparams: QParams) -> None:
        super().__init__()
        self.format, self.granularity = fmt, granularity
        fixed = as_tensors(qparams)
        scales, places = fixed.pop("scale").unique(return_inverse=True)
        self.scale = nn.Parameter(scales)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("smallest", scales * SMALLEST_SHARE, persistent=False)
        self.fixed = tuple(fixed)
        for name, value in fixed.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def qparams(self) -> QParams:
        """The qparams with the learned scale.

        The gradient passes the bound of the scale, so that a scale at its bound can return.
        """
        scale = straight_through(self.scale, torch.maximum(self.scale.detach(), self.smallest))
        fixed = {name: getattr(self, name) for name in self.fixed}
        return from_tensors({"scale": scale[self.places], **fixed})

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        fmt, qparams = self.format, self.qparams
        grid = clip_to_range(qparams.to_grid(self.granularity.split(x).float()), fmt)
        rounded = straight_through(grid, fmt.nearest(grid.detach()))
        return qparams.from_grid(rounded).view(x.shape).to(x.dtype)


@dataclass(frozen=True)
class InputSteps:
    """Learning of the steps of static inputs, in a group of the optimizer of their own.

    Their learning rate falls to 0 with a cosine, as in the authors' code.

    Args:
        lr: Learning rate at the start, in units of the inputs.

    Example:
        >>> LearnedRounding(adaround, optimizer, objective, 200, 16, inputs=InputSteps(lr=4e-5))
    """

    lr: float

    def check(self, layers: Sequence[QuantLayer]) -> None:
        """Check that there are inputs with one static scale and a step that can be learned.

        Raises:
            UserError: if not.
        """
        static = [layer.static_input_fake_quant for layer in layers]
        if not any(static):
            raise UserError(
                "the steps of inputs are learned here, and no input has a static scale while "
                "weights are rounded: choose static activations and "
                "quantize_inputs_while_rounding='${activation}', or another rounding"
            )
        for fake_quant in filter(None, static):
            quantizer = fake_quant.quantizer
            if not isinstance(quantizer.granularity, PerTensor | PerInputChannel) or isinstance(
                quantizer.scale, PreShift
            ):
                raise UserError(
                    "the steps of inputs are learned for one static scale per tensor or part: "
                    "choose activation.granularity=tensor, or another rounding"
                )

    def make_schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """Return a schedule that decays the last group of an optimizer and no other."""

        def decay(step: int) -> float:
            return (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

        constant = [lambda _: 1.0] * (len(optimizer.param_groups) - 1)
        return LambdaLR(optimizer, [*constant, decay])


class StepAttachment:
    """The learned steps of layers' inputs, in place of their static quantizers until `commit`.

    Args:
        layers: Layers. Those without a static input are left as they are.

    Example:
        >>> attachment = StepAttachment(layers)
        >>> optimizer.add_param_group({"params": attachment.steps.parameters(), "lr": 4e-5})
        >>> attachment.commit()
    """

    def __init__(self, layers: Sequence[QuantLayer]) -> None:
        self.replaced: list[tuple[QuantLayer, FakeQuantize]] = []
        self.steps = nn.ModuleList()
        for layer in layers:
            fake_quant = layer.static_input_fake_quant
            if fake_quant is None:
                continue
            qparams = fake_quant.qparams
            assert qparams is not None, "prepare the layer first"
            granularity = fake_quant.quantizer.granularity
            layer.input_fake_quant = LearnedStep(fake_quant.format, granularity, qparams)
            self.steps.append(layer.input_fake_quant)
            self.replaced.append((layer, fake_quant))

    def commit(self) -> None:
        """Put the static quantizers back, with the learned steps."""
        for (layer, fake_quant), step in zip(self.replaced, self.steps, strict=True):
            learned = as_tensors(step.qparams)  # pyright: ignore[reportArgumentType]
            fake_quant.set_qparams(from_tensors({k: v.detach() for k, v in learned.items()}))
            layer.input_fake_quant = fake_quant


@contextmanager
def bypass_inputs(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """Leave the inputs of the layers unquantized inside the `with` statement."""
    quantizers = [layer.input_fake_quant for layer in layers]
    for layer in layers:
        layer.input_fake_quant = nn.Identity()
    try:
        yield
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.input_fake_quant = quantizer


class FixedWeight(LearnableRounding):
    """A weight that is rounded already, for units of which only the steps of inputs are learned.

    Args:
        weight: The hard weight in blocks.
        fmt: Number format.
        qparams: Qparams of the blocks.

    Example:
        >>> rounding = layer.start_learning(FixedWeight)
    """

    weight: Tensor

    def __init__(self, weight: Blocks, fmt: Format, qparams: QParams) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def soft_weight(
        self, beta: float | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Blocks, float]:
        return self.weight.to(dtype), 0.0

    def hard_weight(self) -> Blocks:
        return self.weight
