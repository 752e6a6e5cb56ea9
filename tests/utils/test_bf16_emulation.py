"""Emulated bfloat16 products against exact sums that are rounded once."""

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fp4dit.utils import bf16_emulation
from fp4dit.utils.bf16_emulation import Bf16EmulatedMixedPrecision, EmulateBf16Matmul
from pipelines.runtime.trainer import Runtime


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "mm": (torch.mm, [(24, 40), (40, 16)]),
    "bmm": (torch.bmm, [(3, 24, 40), (3, 40, 16)]),
    "linear": (F.linear, [(5, 24, 40), (16, 40), (16,)]),
    "linear without bias": (F.linear, [(5, 24, 40), (16, 40)]),
    "convolution": (F.conv2d, [(2, 3, 8, 8), (6, 3, 2, 2), (6,)]),
    "attention": (attention, [(2, 4, 20, 16)] * 3),
    "attention with a mask": (masked_attention, [(2, 4, 20, 16)] * 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients_are_those_of_fp64_rounded(name: str):
    product, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes
    ]
    exact = [x.detach().double().requires_grad_() for x in operands]
    with EmulateBf16Matmul():
        result = product(*operands)
        slope = torch.randn(result.shape, generator=generator).bfloat16()
        result.backward(slope)
    expected = product(*exact)
    expected.backward(slope.double())
    assert result.dtype == torch.bfloat16
    assert_close_to(result, expected)
    for x, y in zip(operands, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == torch.bfloat16
        assert_close_to(x.grad, y.grad)


def assert_close_to(result: Tensor, expected: Tensor) -> None:
    """Assert an error of at most half a unit in the last place, or slightly more for attention."""
    error = (result.double() - expected).norm() / expected.norm()
    assert 0 < error < 2**-8


def test_other_types_and_operations_are_left_as_they_are():
    x, w = torch.randn(4, 8), torch.randn(8, 3)
    with EmulateBf16Matmul():
        assert torch.equal(x @ w, torch.mm(x, w))
        assert (x @ w).dtype == torch.float32
        assert torch.equal(x.bfloat16() + 1, torch.add(x.bfloat16(), 1))


class Learns(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def training_step(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.seen.append((y.dtype, any(isinstance(m, EmulateBf16Matmul) for m in active_modes())))
        y.register_hook(
            lambda _: self.seen.append(
                (y.dtype, any(isinstance(m, EmulateBf16Matmul) for m in active_modes()))
            )
        )
        return y.float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def active_modes() -> list[object]:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return _get_current_dispatch_mode_stack()


@pytest.mark.parametrize("native", [True, False])
def test_trainers_on_a_cpu_use_them_where_it_has_no_instructions(
    native: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bf16_emulation, "cpu_has_bf16_matmul", lambda: native)
    task, data = Learns(), DataLoader(torch.randn(2, 4, 8), batch_size=None)
    runtime = Runtime({"accelerator": "cpu"}, progress="none")
    trainer = runtime.make_trainer("", precision="bf16-mixed", devices=1, max_steps=2)
    trainer.fit(task, data)
    assert isinstance(trainer.precision_plugin, Bf16EmulatedMixedPrecision) is not native
    assert task.seen == [(torch.bfloat16, not native)] * 4
    assert trainer.precision == "bf16-mixed"
    full = runtime.make_trainer("", devices=1, max_steps=2)
    assert full.precision == "32-true"
