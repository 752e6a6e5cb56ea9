"""HunyuanDiT: long skip connections, and quantized queries and keys."""

import copy

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.models.hunyuan import Hunyuan, HunyuanAdapter
from fp4dit.numerics.formats import integer
from fp4dit.numerics.quantizer import PerToken, Quantizer
from fp4dit.quantization.apply import quantize_activations_
from fp4dit.quantization.rules import Rule
from tests.helpers import tiny

INT8_PER_TOKEN = Quantizer(integer(8), PerToken())


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> HunyuanAdapter:
    folder = tmp_path_factory.mktemp("hunyuan")
    tiny.save_hunyuan(folder)
    return Hunyuan(str(folder)).load()  # pyright: ignore[reportReturnType]


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, 16)).transpose(1, 2)


@pytest.mark.parametrize("before_norm", [False, True])
@torch.no_grad()
def test_queries_and_keys_are_quantized_before_or_after_norm(
    hunyuan: HunyuanAdapter, before_norm: bool
):
    """The expected output is computed with the attention's own layers.

    Norm and rotary embedding belong together: quantization comes before or after both.
    """
    transformer = copy.deepcopy(hunyuan.transformer)
    attention = transformer.blocks[0].attn1
    rotation = hunyuan.make_rotary_embedding(torch.zeros(1, 4, 8, 8))
    x = torch.randn(2, 16, tiny.WIDTH)

    def quantize(x: Tensor, norm: nn.Module) -> Tensor:
        if before_norm:
            return apply_rotary_emb(norm(INT8_PER_TOKEN(x)), rotation)  # pyright: ignore
        return INT8_PER_TOKEN(apply_rotary_emb(norm(x), rotation))  # pyright: ignore

    q = quantize(split_heads(attention.to_q(x)), attention.norm_q)
    k = quantize(split_heads(attention.to_k(x)), attention.norm_k)
    v = INT8_PER_TOKEN(split_heads(attention.to_v(x)))
    product = F.scaled_dot_product_attention(q, k, v)
    expected = attention.to_out[0](product.transpose(1, 2).flatten(2))
    quantize_activations_(transformer, [Rule("*", INT8_PER_TOKEN, before_norm=before_norm)])
    assert torch.equal(attention(x, image_rotary_emb=rotation), expected)


def test_long_skips_pair_the_blocks_from_both_ends(hunyuan: HunyuanAdapter):
    """The first two of six blocks leave a skip connection for the last two."""
    skips: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for i, block in enumerate(hunyuan.transformer.blocks):

        def hook(
            _module: nn.Module, _args: tuple, kwargs: dict, output: Tensor, i: int = i
        ) -> None:
            skips[i], outputs[i] = kwargs.get("skip"), output

        block.register_forward_hook(hook, with_kwargs=True)
    hunyuan.sample(tiny.PROMPTS[:1], [0], 1, 4.5)
    pairs = [(i, j) for i in range(6) for j in range(6) if skips[j] is outputs[i]]
    assert pairs == [(0, 5), (1, 4)]
    unit_outputs = {unit.module: unit.outputs for unit in hunyuan.units()}
    writers = {name: output for name, output in unit_outputs.items() if "skip" in output[0]}
    assert writers == {"blocks.0": ("skip_0",), "blocks.1": ("skip_1",)}
