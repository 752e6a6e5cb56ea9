"""AdaRound (arXiv:2004.10568) on any grid, and its scale-aware form (arXiv:2503.15465).

Each weight has a parameter v, and lies between two neighbors on the grid, inner and outer. With
h = clip(sigmoid(v / T) (zeta - gamma) + gamma, 0, 1) for a temperature T, the soft weight is
lerp(inner, outer, h), and the rounding loss is the sum of 1 - |2h - 1|^beta. `SoftRound` computes
both, and their gradients with respect to v.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams
from fp4dit.quantization.learnable_rounding import LearnableRounding

# The ends of the stretched sigmoid, so that h reaches 0 and 1 exactly.
GAMMA, ZETA = -0.1, 1.1

# Values per chunk on a CPU. The number is a multiple of the size of SIMD vectors, because values
# that do not fill a vector are computed by other code, whose last digits can differ.
CHUNK_SIZE = 2**17

Flat = Float[Tensor, "n"]

Temperature = Flat | Float[Tensor, ""]


class AdaRound(LearnableRounding):
    """AdaRound (arXiv:2004.10568) on any grid.

    It learns for each weight how far to go from its inner to its outer neighbor on the grid:
    h = clip(sigmoid(v / temperature) (zeta - gamma) + gamma, 0, 1). The original method learns
    floor(w / s) + h with one step size. A float grid has a step per binade, so here h interpolates
    the two neighbors, and the same class serves integers and floats. Before training, the soft
    weight is the weight, and the hard one is the weight rounded to nearest.

    Args:
        weight: Weight in blocks that share a scale.
        fmt: Number format.
        qparams: Qparams of the blocks.
        temperature: Divisor of v: one number for all weights, or one for each weight.

    Example:
        >>> rounding = AdaRound(weight_blocks, floating(2, 1), qparams)
        >>> weight, rounding_loss = rounding.soft_weight(beta=20.0)
    """

    temperature: Tensor
    inner: Tensor
    outer: Tensor

    def __init__(
        self,
        weight: Blocks,
        fmt: Format,
        qparams: QParams,
        temperature: Float[Tensor, "*n"] | float = 1.0,
    ) -> None:
        super().__init__()
        x = qparams.to_grid(weight)
        inner, outer = fmt.bracket(x)
        # A weight whose neighbors coincide has nothing to learn, and counts as decided.
        width = outer - inner
        start = torch.where(width == 0, 1.0, (x - inner) / width).clamp(0, 1)
        logit = torch.logit((start - GAMMA) / (ZETA - GAMMA))
        # At a tie the logit is 0, or has any sign because of floating-point errors. It gets the
        # sign of the neighbor that rounding to nearest takes.
        eps = torch.finfo(logit.dtype).eps
        logit = torch.where(fmt.nearest(x) == outer, logit.clamp(min=eps), logit.clamp(max=-eps))
        self.v = nn.Parameter(temperature * logit)
        self.register_buffer("temperature", torch.as_tensor(temperature), persistent=False)
        self.register_buffer("inner", qparams.from_grid(inner), persistent=False)
        self.register_buffer("outer", qparams.from_grid(outer), persistent=False)

    def soft_weight(
        self, beta: float | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Blocks, Float[Tensor, ""]]:
        """Return the soft weight, and the rounding loss: the sum of 1 - |2h - 1|^beta."""
        return SoftRound.apply(self.v, self.temperature, self.inner, self.outer, beta, dtype)  # pyright: ignore[reportReturnType]

    def hard_weight(self) -> Blocks:
        return torch.where(self.v >= 0, self.outer, self.inner)


def adaround(weight: Blocks, fmt: Format, qparams: QParams) -> AdaRound:
    """Return plain AdaRound: all weights learn at the same rate."""
    return AdaRound(weight, fmt, qparams)


def adaround_scale_aware(weight: Blocks, fmt: Format, qparams: QParams) -> AdaRound:
    """Return scale-aware AdaRound (arXiv:2503.15465, Eq. 8): v has the unit of the weight.

    Under Adam this is plain AdaRound with a learning rate of lr / step for each weight: the finer
    the step of a weight, the faster its rounding changes. The result therefore depends on the
    absolute size of the weights.
    """
    return AdaRound(weight, fmt, qparams, _local_step(weight, fmt, qparams))


def adaround_scale_aware_normalized(weight: Blocks, fmt: Format, qparams: QParams) -> AdaRound:
    """Return scale-aware AdaRound in units of the layer's mean step.

    Unlike `adaround_scale_aware` it does not depend on the absolute size of the weights.
    """
    step = _local_step(weight, fmt, qparams)
    return AdaRound(weight, fmt, qparams, step / step.mean())


def _local_step(weight: Blocks, fmt: Format, qparams: QParams) -> Blocks:
    """Return the distance between grid values at each weight, in the unit of the weight."""
    grid = qparams.to_grid(weight)
    return fmt.step(grid.clamp(fmt.min, fmt.max)) * qparams.unit(grid)


class SoftRound(torch.autograd.Function):
    """Fused forward and backward pass of AdaRound's soft rounding.

    It returns the soft weight in `dtype`, and the rounding loss, which is 0 if `beta` is None. Both
    come from one function, so that each pass computes the sigmoid and reads v only once.

    The backward pass is implemented by hand. Autograd computes the same gradients to the last
    digit, but saves eight tensors of the weight's size for them. This function saves its inputs
    only, and on a CPU the intermediate values of a chunk stay in the cache.

    Example:
        >>> weight, loss = SoftRound.apply(v, temperature, inner, outer, 2.0, torch.float32)
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        temperature: Tensor,
        inner: Tensor,
        outer: Tensor,
        beta: float | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(v, temperature, inner, outer)
        ctx.beta = beta
        weight = torch.empty_like(v, dtype=dtype, memory_format=torch.contiguous_format)
        losses = v.new_zeros(()) if beta is None else torch.empty_like(weight, dtype=v.dtype)
        chunks = iterate_chunks(v, temperature, inner, outer, weight, losses)
        for v_part, t_part, inner_part, outer_part, weight_part, loss_part in chunks:
            h = stretch_sigmoid(tempered_sigmoid(v_part, t_part)).clamp_(0, 1)
            weight_part.copy_(torch.lerp(inner_part, outer_part, h))
            if beta is not None:
                torch.sub(1, h.mul_(2).sub_(1).abs_().pow_(beta), out=loss_part)
        return weight, losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        v, *others = ctx.saved_tensors
        grad_weight, grad_loss = grads
        grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
        chunks = iterate_chunks(v, *others, grad_weight, grad_v)
        for v_part, t_part, inner_part, outer_part, grad_weight_part, grad_v_part in chunks:
            sigmoid = tempered_sigmoid(v_part, t_part)
            stretched = stretch_sigmoid(sigmoid)
            h = stretched.clamp(0, 1)
            inside = stretched.eq_(h)  # 1.0 where h is not clipped, else 0.0
            grad_h = (outer_part - inner_part).mul_(grad_weight_part)
            from_weight = sigmoid_gradient(grad_h, inside, sigmoid)
            torch.div(from_weight, t_part, out=grad_v_part)
            if ctx.beta is not None:
                signed = h.mul_(2).sub_(1)  # 2h - 1
                grad_signed = signed.abs().pow_(ctx.beta - 1).mul_(ctx.beta).mul_(-grad_loss)
                grad_signed.mul_(signed.sgn_())
                from_loss = sigmoid_gradient(grad_signed.mul_(2), inside, sigmoid)
                grad_v_part.add_(from_loss.div_(t_part))
        return grad_v, None, None, None, None, None


def tempered_sigmoid(v: Flat, temperature: Temperature) -> Flat:
    """Return sigmoid(v / temperature)."""
    return (v / temperature).sigmoid_()


def stretch_sigmoid(sigmoid: Flat) -> Flat:
    """Return the sigmoid stretched from (0, 1) to (gamma, zeta)."""
    return (sigmoid * (ZETA - GAMMA)).add_(GAMMA)


def sigmoid_gradient(grad_h: Flat, inside: Flat, sigmoid: Flat) -> Flat:
    """Return the gradient of v / temperature from that of h, which is overwritten.

    Args:
        grad_h: Gradient of h.
        inside: 1 where h is not clipped, else 0.
        sigmoid: Sigmoid of v / temperature.
    """
    return torch.ops.aten.sigmoid_backward(grad_h.mul_(inside).mul_(ZETA - GAMMA), sigmoid)


def iterate_chunks(first: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """Iterate over chunks of tensors of the same size; scalars are repeated for each chunk."""
    size = CHUNK_SIZE if first.device.type == "cpu" else first.numel()
    flat = [x.reshape(-1) if x.ndim else x for x in (first, *others)]
    for start in range(0, first.numel(), size):
        yield [x[start : start + size] if x.ndim else x for x in flat]
