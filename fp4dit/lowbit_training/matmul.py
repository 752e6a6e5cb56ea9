"""The three matrix products of a linear layer in low-bit training.

This is algorithm 1 of Quartet (arXiv:2505.14669). The forward pass multiplies x and W^T, each
rotated block by block with a Hadamard matrix and quantized. The backward pass computes the
gradients of x and W from operands that are rotated with random signs and quantized again, along
the dimension that is summed over. Gradients of clipped values are zero.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dit.lowbit_training import scaled_mm, triton_ops
from fp4dit.lowbit_training.operand_quant import (
    E2M1,
    Alpha,
    BlockOperandQuantizer,
    OperandQuantizer,
    QuantizedOperand,
    absmax_quantizer,
    quest_quantizer,
    rotate_operand,
)
from fp4dit.lowbit_training.rng import BackwardRng, BlockSigns

Left = Float[Tensor, "m k"]

Right = Float[Tensor, "o k"]


@dataclass(frozen=True)
class MatmulRecipe:
    """Quantizers of the operands of a linear layer's products.

    Args:
        forward: Quantizer of the input and of the weight.
        backward: Quantizer of the operands of the gradients' products; None computes these in
            high precision.

    Raises:
        ValueError: If the forward quantizer is stochastic. Activation checkpointing computes the
            forward product again, and the second product must be the same.

    Example:
        >>> recipe = MatmulRecipe(quest_quantizer(), absmax_quantizer(stochastic=True))
    """

    forward: OperandQuantizer = field(default_factory=quest_quantizer)
    backward: OperandQuantizer | None = field(default_factory=absmax_quantizer)

    def __post_init__(self) -> None:
        if self.forward.stochastic:
            raise ValueError(
                "the forward product must be the same whenever it is computed: round it to nearest"
            )


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the operands of a product in `dtype`.

    It is bf16 for fp16, whose exponents are too few for the scales of gradients.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


def apply_alpha(
    product: Float[Tensor, "m o"], alpha: Alpha, dtype: torch.dtype
) -> Float[Tensor, "m o"]:
    """Return alpha * product in `dtype`."""
    is_one = isinstance(alpha, float) and alpha == 1
    return (product if is_one else product * alpha).to(dtype)


def matmul_plain(a: Left, b: Right, alpha: Alpha, dtype: torch.dtype) -> Float[Tensor, "m o"]:
    """Return alpha * a b^T without quantization."""
    return apply_alpha(a.to(operand_dtype(dtype)) @ b.to(operand_dtype(dtype)).T, alpha, dtype)


def quantize_operand(
    quantizer: OperandQuantizer,
    x: Left,
    signs: BlockSigns | None = None,
    alpha: Alpha = 1.0,
    generator: torch.Generator | None = None,
) -> QuantizedOperand:
    """Return alpha * x, rotated and quantized, by a fused GPU kernel if there is one.

    Args:
        quantizer: Quantizer of the operand.
        x: Operand; its rows are quantized.
        signs: Signs of the channels of each block before the rotation.
        alpha: Factor of x.
        generator: Generator of stochastic rounding, on the device of x.
    """
    is_e2m1 = isinstance(quantizer, BlockOperandQuantizer) and quantizer.quantizer.format == E2M1
    packed = is_e2m1 and scaled_mm.supports_scaled_mm(x.device)
    config = None
    if x.is_cuda and x.dtype != torch.float64:
        config = triton_ops.make_kernel_config(quantizer)
    if config is None:
        return quantizer(rotate_operand(x, signs, alpha), generator)
    return triton_ops.quantize_operand_on_gpu(x, config, signs, alpha, generator, packed)


def matmul_operands(
    left: QuantizedOperand, right: QuantizedOperand, dtype: torch.dtype
) -> Float[Tensor, "m o"]:
    """Return left right^T, by block-scaled hardware, whose output is bf16, where possible."""
    alpha = left.alpha * right.alpha
    if (
        left.packed
        and right.packed
        and scaled_mm.has_aligned_rows(right.packed)
        and operand_dtype(dtype) == torch.bfloat16
    ):
        return apply_alpha(scaled_mm.matmul_scaled(left.packed, right.packed), alpha, dtype)
    return matmul_plain(left.values, right.values, alpha, dtype)


def operand_gradient(
    grad: Left, unclipped: Bool[Tensor, "m k"] | None, width: int, dtype: torch.dtype
) -> Float[Tensor, "m width"]:
    """Return the gradient of an operand from that of the rotated and quantized operand.

    Args:
        grad: Gradient of the rotated operand.
        unclipped: False for values that were clipped, which get no gradient.
        width: Columns of the operand without padding.
        dtype: Dtype of the operand.
    """
    grad = grad if unclipped is None else grad * unclipped
    return rotate_operand(grad)[:, :width].to(dtype)


class LowBitMatmul(torch.autograd.Function):
    """x W^T in `dtype` from rotated and quantized operands.

    In the backward products, the blocks lie along the output channels for the gradient of x, and
    along the tokens for that of W.

    Example:
        >>> y = LowBitMatmul.apply(x, weight, MatmulRecipe(), BackwardRng(seed=0), torch.float32)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        recipe: MatmulRecipe,
        backward_rng: BackwardRng,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a = quantize_operand(recipe.forward, x)
            b = quantize_operand(recipe.forward, weight)
            a = a._replace(values=a.values.to(operand_dtype(dtype)))
            b = b._replace(values=b.values.to(operand_dtype(dtype)))
            ctx.save_for_backward(a.values, a.unclipped, b.values, b.unclipped)
            ctx.alphas, ctx.quantizer = (a.alpha, b.alpha), recipe.backward
            ctx.backward_rng, ctx.width = backward_rng, x.shape[1]
            ctx.dtypes = (x.dtype, weight.dtype)
            return matmul_operands(a, b, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        [grad] = grads
        x, x_unclipped, weight, weight_unclipped = ctx.saved_tensors
        products = [(grad, weight.T, x_unclipped), (grad.T, x.T, weight_unclipped)]
        operand_grads: list[Tensor | None] = [None, None]
        with torch.autocast(grad.device.type, enabled=False):
            *signs, generator = ctx.backward_rng(grad.device)
            for i, (left, right, unclipped) in enumerate(products):
                if not ctx.needs_input_grad[i]:
                    continue
                alpha = ctx.alphas[1 - i]
                if ctx.quantizer is None:
                    product = matmul_plain(left, right, alpha, grad.dtype)
                else:
                    a = quantize_operand(ctx.quantizer, left, signs[i], 1.0, generator)
                    b = quantize_operand(ctx.quantizer, right, signs[i], alpha, generator)
                    product = matmul_operands(a, b, grad.dtype)
                operand_grads[i] = operand_gradient(product, unclipped, ctx.width, ctx.dtypes[i])
        return *operand_grads, None, None, None
