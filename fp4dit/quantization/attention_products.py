"""Attention whose products take quantized numbers only, computed step by step in floating point."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.quantizer import PerGroup, Quantizer

Queries = Float[Tensor, "*b m d"]  # m tokens of each head
Keys = Float[Tensor, "*b n d"]
FakeQuantizeFn = Callable[[Tensor], Tensor]


@runtime_checkable
class AttentionProducts(Protocol):
    """Protocol of replacements of `F.scaled_dot_product_attention`.

    Example:
        >>> products: AttentionProducts = SageAttention(nvfp4)
        >>> products(query, key, value, {"q": nvfp4, "k": nvfp4, "v": nvfp4}).shape == query.shape
        True
    """

    def __call__(
        self,
        query: Queries,
        key: Keys,
        value: Keys,
        quantizers: Mapping[str, FakeQuantizeFn],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Queries:
        """Return the attention of unquantized operands.

        Args:
            query: The queries.
            key: The keys.
            value: The values.
            quantizers: The function that fake-quantizes each operand, under "q", "k" and "v".
            attn_mask: As in `F.scaled_dot_product_attention`, like all that follow.
        """
        ...


@dataclass(frozen=True)
class SageAttention:
    """Attention with quantized probabilities (SageAttention 3, arXiv:2505.11594), simulated.

    Of the queries and the keys, the mean over tokens is subtracted before they are quantized. The
    mean of the keys shifts all scores of a query alike, which the softmax ignores. That of the
    queries is multiplied by the unquantized keys and added again. Probabilities are quantized
    before they are divided by their sum, so that the largest one of each query is 1: NVFP4's scale
    for a tensor then is the first level of the paper's two-level scales, and its scales for blocks
    are the second. Blocks of the probabilities and of the values run along the tokens that their
    product sums over; if the last block is not full, it is filled with zeros.

    Attributes:
        probabilities: The quantizer of the probabilities.
        smooth_queries: Whether the mean of the queries, over each `block` of them, is subtracted.
        smooth_keys: Whether the mean of the keys is subtracted.
        block: The number of queries that are computed together.

    Example:
        >>> nvfp4 = Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale())
        >>> attention = SageAttention(nvfp4)
        >>> y = attention(query, key, value, {"q": nvfp4, "k": nvfp4, "v": nvfp4})
    """

    probabilities: Quantizer
    smooth_queries: bool = True
    smooth_keys: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"attention in blocks of {self.block} queries computes nothing")

    def __call__(
        self,
        query: Queries,
        key: Keys,
        value: Keys,
        quantizers: Mapping[str, FakeQuantizeFn],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Queries:
        if dropout_p or enable_gqa:
            raise ValueError("attention with quantized products has no dropout and no shared heads")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if self.smooth_keys:
            key = key - key.mean(-2, keepdim=True)
        keys = quantizers["k"](key)
        values = quantize_along_tokens(quantizers["v"], value)
        mask = make_additive_mask(query, key, attn_mask, is_causal)
        outputs = []
        for start in range(0, query.shape[-2], self.block):
            rows = slice(start, start + self.block)
            queries = query[..., rows, :]
            if self.smooth_queries:
                mean = queries.mean(-2, keepdim=True)
                scores = quantizers["q"](queries - mean) @ keys.mT + mean @ key.mT
            else:
                scores = quantizers["q"](queries) @ keys.mT
            scores = scores * factor + mask[..., rows, :]
            largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
            probabilities = (scores - largest).exp()
            quantized = fill_and_quantize(self.probabilities, probabilities)
            outputs.append(quantized @ values / probabilities.sum(-1, keepdim=True))
        return torch.cat(outputs, -2)


def make_additive_mask(
    query: Queries,
    key: Keys,
    mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None,
    is_causal: bool,
) -> Float[Tensor, "..."]:
    """Return what is added to the scores, broadcastable to them."""
    total = query.new_zeros(query.shape[-2], key.shape[-2])
    if is_causal:
        total = total.masked_fill(~torch.ones_like(total, dtype=torch.bool).tril(), -torch.inf)
    if mask is None:
        return total
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    return total + mask


def quantize_along_tokens(quantize: FakeQuantizeFn, value: Keys) -> Keys:
    """Fake-quantize values with blocks that run along the tokens, those of each channel."""
    return fill_and_quantize(quantize, value.mT).mT


def fill_and_quantize(quantize: FakeQuantizeFn, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """Fake-quantize rows that are filled with zeros up to whole groups."""
    quantizer = getattr(quantize, "quantizer", quantize)
    granularity = getattr(quantizer, "granularity", None)
    size = granularity.size if isinstance(granularity, PerGroup) else 1
    return quantize(F.pad(x, (0, -x.shape[-1] % size)))[..., : x.shape[-1]]
