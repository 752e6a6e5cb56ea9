"""Derivatives written out, against autograd's: the same digits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp4dit.opening import HIGH, LOW, PIECE, Soft


def h(v: Tensor, temperature: Tensor) -> Tensor:
    return (torch.sigmoid(v / temperature) * (HIGH - LOW) + LOW).clamp(0, 1)


def soft(v: Tensor, temperature: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    return torch.lerp(inner, outer, h(v, temperature))


def undecided(v: Tensor, temperature: Tensor, beta: float) -> Tensor:
    return 1 - (2 * h(v, temperature) - 1).abs().pow(beta)


@pytest.mark.parametrize("rows", [3, 2 * PIECE // 8 + 5])
@pytest.mark.parametrize("own", [False, True], ids=["one temperature", "a temperature each"])
@pytest.mark.parametrize("beta", [None, 20.0, 7.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digits_are_those_of_autograd(rows: int, own: bool, beta: float | None, dtype: torch.dtype):
    torch.manual_seed(0)
    v, inner, outer = 3 * torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(rows, 8)
    temperature = torch.rand(rows, 8) + 0.5 if own else torch.tensor(0.7)
    given, pressed = torch.randn(rows, 8).to(dtype), torch.tensor(0.3)

    def theirs(v: Tensor) -> tuple[Tensor, Tensor]:
        left = torch.zeros(()) if beta is None else undecided(v, temperature, beta).sum()
        return soft(v, temperature, inner, outer).to(dtype), left

    def found(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        x = v.clone().requires_grad_()
        weight, left = function(x)
        ((weight * given).sum() + pressed * left).backward()
        return weight.detach(), left.detach(), x.grad  # pyright: ignore[reportReturnType]

    ours = found(lambda v: Soft.apply(v, temperature, inner, outer, beta, dtype))  # pyright: ignore[reportArgumentType, reportReturnType]
    for a, b in zip(ours, found(theirs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_values_that_do_not_lie_in_order():
    v, inner, outer = torch.randn(3, 8, 5).permute(0, 2, 1).unbind()
    assert not v.is_contiguous()
    x = v.detach().requires_grad_()
    answer, _ = Soft.apply(x, torch.tensor(1.0), inner, outer, None, torch.float32)  # pyright: ignore[reportGeneralTypeIssues]
    torch.testing.assert_close(answer, soft(v, torch.tensor(1.0), inner, outer))
    answer.sum().backward()
    expected = torch.autograd.functional.jvp(lambda v: soft(v, torch.tensor(1.0), inner, outer), v, torch.ones_like(v))
    torch.testing.assert_close(x.grad, expected[1])
