"""Test that the fused soft rounding has the same digits as autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp4dit.rounding.adaround import CHUNK_SIZE, GAMMA, ZETA, SoftRound


def soft_step(v: Tensor, temperature: Tensor) -> Tensor:
    return (torch.sigmoid(v / temperature) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def soft_weight(v: Tensor, temperature: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    return torch.lerp(inner, outer, soft_step(v, temperature))


def loss_terms(v: Tensor, temperature: Tensor, beta: float) -> Tensor:
    return 1 - (2 * soft_step(v, temperature) - 1).abs().pow(beta)


@pytest.mark.parametrize("rows", [3, 2 * CHUNK_SIZE // 8 + 5])
@pytest.mark.parametrize("per_weight", [False, True], ids=["one temperature", "per weight"])
@pytest.mark.parametrize("beta", [None, 20.0, 7.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digits_are_those_of_autograd(
    rows: int, per_weight: bool, beta: float | None, dtype: torch.dtype
):
    torch.manual_seed(0)
    v, inner, outer = 3 * torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(rows, 8)
    temperature = torch.rand(rows, 8) + 0.5 if per_weight else torch.tensor(0.7)
    weight_grad, loss_grad = torch.randn(rows, 8).to(dtype), torch.tensor(0.3)

    def fused(v: Tensor) -> tuple[Tensor, Tensor]:
        return SoftRound.apply(v, temperature, inner, outer, beta, dtype)  # pyright: ignore

    def reference(v: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.zeros(()) if beta is None else loss_terms(v, temperature, beta).sum()
        return soft_weight(v, temperature, inner, outer).to(dtype), loss

    def compute_results_and_gradients(
        function: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = v.clone().requires_grad_()
        weight, loss = function(x)
        ((weight * weight_grad).sum() + loss_grad * loss).backward()
        return weight.detach(), loss.detach(), x.grad  # pyright: ignore[reportReturnType]

    actual, expected = (
        compute_results_and_gradients(fused),
        compute_results_and_gradients(reference),
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_tensors_may_be_non_contiguous():
    v, inner, outer = torch.randn(3, 8, 5).permute(0, 2, 1).unbind()
    assert not v.is_contiguous()
    x = v.detach().requires_grad_()
    weight, _ = SoftRound.apply(x, torch.tensor(1.0), inner, outer, None, torch.float32)  # pyright: ignore[reportGeneralTypeIssues]
    torch.testing.assert_close(weight, soft_weight(v, torch.tensor(1.0), inner, outer))
    weight.sum().backward()
    expected = torch.autograd.functional.jvp(
        lambda v: soft_weight(v, torch.tensor(1.0), inner, outer), v, torch.ones_like(v)
    )
    torch.testing.assert_close(x.grad, expected[1])
