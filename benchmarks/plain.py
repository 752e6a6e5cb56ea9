"""Plain reference: AdaRound of a block, to compare ours with.

It is a reimplementation from the paper (arXiv:2503.15465) of what FP4DiT's released code does.
Everything is fp32, attention is materialized, each forward pass computes the grid of every weight
again, all that requires a gradient gets one, the graph of a step is retained until the next one is
built, and the loss is read at every step.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.numerics.qparams import Blocks
from fp4dit.utils.calls import Call


class PlainLayer(nn.Module):
    """Linear layer on a float grid with a clip value per group and scale-aware roundings `v`.

    `u` is the weight in steps of the grid.
    """

    limit: Tensor

    def __init__(self, source: nn.Linear, exponent: int, mantissa: int, group: int) -> None:
        super().__init__()
        self.source, self.exponent, self.mantissa, self.group = source, exponent, mantissa, group
        with torch.no_grad():
            self.register_buffer("limit", self.blocks.abs().amax(1, keepdim=True))
            u, self.step = self.scale_to_grid()
            self.v = nn.Parameter(-self.step * (1.2 / (u - u.floor() + 0.1) - 1).log())

    @property
    def blocks(self) -> Blocks:
        """Weight in groups."""
        return self.source.weight.reshape(-1, self.group)

    def scale_to_grid(self) -> tuple[Blocks, Blocks]:
        """Return the weights in steps of their binade, and these steps."""
        bias = 2**self.exponent - 1 - self.limit.log2() + math.log2(2 - 2**-self.mantissa)
        w = self.blocks.clamp(-self.limit, self.limit)
        binade = (w.abs().log2() + bias).floor().detach().clamp(min=1)
        step = 2.0 ** (binade - self.mantissa - bias)
        return w / step, step

    def soft_step(self) -> Blocks:
        """Return how far each weight goes from the lower to the upper grid value."""
        return (1.2 * (self.v / self.step).sigmoid() - 0.1).clamp(0, 1)

    def forward(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        u, self.step = self.scale_to_grid()
        soft = (self.step * (u.floor() + self.soft_step())).clamp(-self.limit, self.limit)
        return F.linear(x, soft.view_as(self.source.weight), self.source.bias)


def wrap_linear_layers_(
    block: nn.Module, exponent: int = 2, mantissa: int = 1, group: int = 128
) -> list[PlainLayer]:
    """Wrap a block's linear layers, and materialize its attention, in place."""
    block.requires_grad_(True)
    layers = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = PlainLayer(module, exponent, mantissa, group)
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    for module in block.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return list(layers.values())


def fit_roundings(
    block: nn.Module,
    layers: list[PlainLayer],
    examples: Iterator[tuple[Call, Tensor]],
    steps: int,
    lr: float = 1e-3,
    weight: float = 0.01,
) -> list[float]:
    """Learn the roundings, and return the loss of each step."""
    adam = torch.optim.Adam([layer.v for layer in layers], lr)
    losses = []
    for step in range(steps):
        adam.zero_grad()
        (call, target), progress = next(examples), step / steps
        loss = (call(block) - target).square().sum(1).mean()
        if progress >= 0.2:
            loss = loss + weight * rounding_loss(layers, beta=20 - 18 * (progress - 0.2) / 0.8)
        loss.backward(retain_graph=True)
        adam.step()
        losses.append(loss.item())
    return losses


def rounding_loss(layers: Iterable[PlainLayer], beta: float) -> Float[Tensor, ""]:
    """Return the rounding loss of all layers."""
    losses = []
    for layer in layers:
        losses.append((1 - (2 * layer.soft_step() - 1).abs() ** beta).sum())
    return torch.stack(losses).sum()
