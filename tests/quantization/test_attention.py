"""Quantized attention against diffusers' own processor and a hand-written product."""

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.numerics.block_scales import NVFP4Scale
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.quantizer import PerGroup, PerToken, Quantizer
from fp4dit.quantization.apply import quantize_activations_
from fp4dit.quantization.attention import QuantProcessor
from fp4dit.quantization.attention_products import SageAttention
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.rules import Rule

E2M1_TOKEN = Quantizer(floating(2, 1), PerToken())
INT8_TOKEN = Quantizer(integer(8), PerToken())


@pytest.fixture(params=["self", "cross"])
def attention_case(request: pytest.FixtureRequest) -> tuple[Attention, dict[str, Tensor]]:
    """Attention with 2 heads of 16, and its arguments with a mask that hides some keys."""
    torch.manual_seed(0)
    crossed = request.param == "cross"
    attention = Attention(32, 32 if crossed else None, heads=2, dim_head=16, bias=True).eval()
    arguments = {"hidden_states": torch.randn(3, 10, 32)}
    if crossed:
        arguments["encoder_hidden_states"] = torch.randn(3, 7, 32)
    keys = 7 if crossed else 10
    arguments["attention_mask"] = torch.where(torch.arange(keys) < 5, 0.0, -10000.0).expand(
        3, 1, keys
    )
    return attention, arguments


def quantize_attention(attention: Attention, **operands: Quantizer) -> Attention:
    quantized_attention = copy.deepcopy(attention)
    quantized_attention.set_processor(QuantProcessor(quantized_attention.processor))
    for name, quantizer in operands.items():
        setattr(quantized_attention.processor, name, FakeQuantize(quantizer))
    return quantized_attention


def by_hand(
    attention: Attention, arguments: dict[str, Tensor], q: Quantizer, k: Quantizer, v: Quantizer
) -> Tensor:
    """softmax(Q(q) Q(k)^T / sqrt(d) + mask) Q(v), head by head and token by token."""
    x = arguments["hidden_states"]
    text = arguments.get("encoder_hidden_states", x)
    heads = lambda y: y.unflatten(2, (2, 16)).transpose(1, 2)
    each = lambda quantizer, y: torch.stack([quantizer(token) for token in y.flatten(0, 2)]).view(
        y.shape
    )
    query = each(q, heads(attention.to_q(x)))
    key = each(k, heads(attention.to_k(text)))
    value = each(v, heads(attention.to_v(text)))
    weights = (query @ key.mT / 4 + arguments["attention_mask"][:, None]).softmax(-1)
    return attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_without_quantizers_it_is_diffusers_own_to_the_bit(
    attention_case: tuple[Attention, dict[str, Tensor]],
):
    attention, arguments = attention_case
    assert torch.equal(quantize_attention(attention)(**arguments), attention(**arguments))


@torch.no_grad()
def test_equals_attention_by_hand_on_quantized_operands(
    attention_case: tuple[Attention, dict[str, Tensor]],
):
    attention, arguments = attention_case
    quantized_attention = quantize_attention(attention, q=INT8_TOKEN, k=E2M1_TOKEN, v=INT8_TOKEN)
    expected = by_hand(attention, arguments, INT8_TOKEN, E2M1_TOKEN, INT8_TOKEN)
    torch.testing.assert_close(quantized_attention(**arguments), expected, rtol=1e-4, atol=1e-5)
    assert (expected - attention(**arguments)).abs().max() > 1e-2  # else this would show nothing


@torch.no_grad()
def test_each_operand_has_its_own_quantizer(attention_case: tuple[Attention, dict[str, Tensor]]):
    attention, arguments = attention_case
    answers = [quantize_attention(attention, **{name: E2M1_TOKEN})(**arguments) for name in "qkv"]
    answers.append(attention(**arguments))
    assert all(not torch.equal(a, b) for i, a in enumerate(answers) for b in answers[:i])


@torch.no_grad()
def test_tokens_and_heads_have_scales_of_their_own(
    attention_case: tuple[Attention, dict[str, Tensor]],
):
    attention, arguments = attention_case
    quantized_attention, shapes = (
        quantize_attention(attention, q=E2M1_TOKEN, k=E2M1_TOKEN, v=E2M1_TOKEN),
        {},
    )
    for name in "qkv":
        operand = getattr(quantized_attention.processor, name)
        operand.register_forward_hook(
            lambda m, args, out, n=name: shapes.update(
                {n: len(m.quantizer.compute_qparams(args[0]).scale)}
            )
        )
    quantized_attention(**arguments)
    keys = arguments.get("encoder_hidden_states", arguments["hidden_states"]).shape[1]
    assert shapes == {"q": 3 * 2 * 10, "k": 3 * 2 * keys, "v": 3 * 2 * keys}


def test_other_products_are_left_alone():
    q = torch.randn(1, 2, 4, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    processor = QuantProcessor(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, q, value=q)
    )
    processor.q = FakeQuantize(E2M1_TOKEN)
    assert not torch.equal(processor(), expected)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, q, q), expected)


def by_hand_sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SageAttention 3 for one head of float64, with scales of two levels, block by block."""

    def nvfp4(x: Tensor, tensor_scale: Tensor | float) -> Tensor:
        """Quantize blocks of 16 along the last dimension."""
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        blocks = x.unflatten(-1, (-1, 16))
        scale = (blocks.abs().amax(-1, keepdim=True) / 6 / tensor_scale).float()
        scale = scale.to(torch.float8_e4m3fn).double() * tensor_scale
        ratio = torch.where(scale > 0, blocks / scale, 0.0)
        nearest = (ratio.abs()[..., None] - grid).abs().argmin(-1)
        return (grid[nearest] * ratio.sign() * scale).flatten(-2)

    def with_tensor_scale(x: Tensor) -> Tensor:
        return nvfp4(x, x.abs().max() / (6 * 448))

    mean, k = q.mean(0), k - k.mean(0)
    scores = with_tensor_scale(q - mean) @ with_tensor_scale(k).T + mean @ k.T
    scores = scores / q.shape[1] ** 0.5 + mask
    p = (scores - scores.amax(1, keepdim=True)).exp()
    first = p.amax(1, keepdim=True) / (448 * 6)  # the paper's scale of a row
    return nvfp4(p / first, 1.0) * first @ with_tensor_scale(v.T).T / p.sum(1, keepdim=True)


def test_quantized_probabilities_equal_a_plain_computation():
    nvfp4 = Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(48, 32, generator=generator).double() for _ in "qkv")
    k = k + 3.0
    mask = torch.zeros(48, 48).double().masked_fill(torch.arange(48) >= 40, -torch.inf)
    operands = {"q": nvfp4, "k": nvfp4, "v": nvfp4}
    y = SageAttention(nvfp4)(q, k, v, operands, attn_mask=mask)
    torch.testing.assert_close(y, by_hand_sage(q, k, v, mask), rtol=1e-6, atol=1e-7)
    plain = F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
    rough = SageAttention(nvfp4, False, False)(q, k, v, operands, attn_mask=mask)
    assert 1e-3 < (y - plain).norm() < 0.7 * (rough - plain).norm()  # smoothing helps


@pytest.mark.parametrize("masking", ["none", "bool", "causal"])
def test_with_exact_operands_it_is_torchs_attention(masking: str):
    """Quantize probabilities to 16 bits, and nothing else."""
    exact = Quantizer(integer(16), PerToken())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator) for n in (9, 9, 9))
    arguments: dict[str, Any] = {"is_causal": masking == "causal"}
    if masking == "bool":
        arguments["attn_mask"] = torch.arange(9).view(1, 1, 1, 9).expand(2, 1, 1, 9) < 7
    operands = {name: lambda x: x for name in "qkv"}
    y = SageAttention(exact, block=4)(q, k, v, operands, **arguments)
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_rule_installs_the_products(attention_case: tuple[Attention, dict[str, Tensor]]):
    attention, arguments = attention_case
    products = SageAttention(INT8_TOKEN)
    model = nn.ModuleDict({"attn": attention})
    quantize_activations_(model, [Rule("attn.?", INT8_TOKEN, attention=products)])
    quantized = attention(**arguments)
    attention.processor.products = None
    assert not quantized.equal(attention(**arguments))
    torch.testing.assert_close(quantized, attention(**arguments), rtol=0.1, atol=0.02)
