"""GELU of the compiled kernel, compared with torch in fp64."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch.nn import functional as F

from fp4dit.packed.nn import gelu
from fp4dit.packed.nn.kernels import find_kernels

needs_kernels = pytest.mark.skipif(find_kernels() is None, reason="no kernels were compiled")
SPECIAL = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e30, -1e30, 1e-42, 12.0, -12.0, -60.0])


@needs_kernels
def test_error_is_that_of_torch():
    x = torch.linspace(-12, 12, 100_001)
    expected = F.gelu(x.double(), approximate="tanh")
    error = (gelu.gelu_tanh(x) - expected).abs()
    assert error.max() < 1.5 * (F.gelu(x, approximate="tanh") - expected).abs().max()
    relative = error / expected.abs()
    assert relative[x > -4].max() < 4e-6  # torch: 8e-4, where its tanh is close to -1
    in_bf16 = gelu.gelu_tanh(x.bfloat16())
    rounded = F.gelu(x.bfloat16().double(), approximate="tanh").bfloat16()
    assert (in_bf16 != rounded)[x > -4].float().mean() < 1e-3


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values(dtype: torch.dtype):
    x = SPECIAL.to(dtype)
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu.gelu_tanh(x), expected, equal_nan=True, rtol=1e-3, atol=1e-7)


def test_bits_do_not_depend_on_threads_or_strides(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3, 5000).T
    expected, before = gelu.gelu_tanh(x.contiguous()), torch.get_num_threads()
    monkeypatch.setattr(gelu, "OPERATIONS_PER_VALUE", 2**20)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert gelu.gelu_tanh(x).equal(expected)
    torch.set_num_threads(before)


def test_only_the_tanh_form_is_replaced_and_gradients_are_torch_s():
    tanh, erf = (FeedForward(32, activation_fn=name) for name in ("gelu-approximate", "gelu"))
    x = torch.randn(7, 32)
    for module in (tanh, erf):
        expected = module(x)
        gelu.use_gelu_kernel_(module)
        assert module(x).equal(expected)  # autograd has to see this call
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        assert erf(x).equal(erf.requires_grad_(False)(x))
