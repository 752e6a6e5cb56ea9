"""Quantized attention: fake quantization of queries, keys and values, for any model."""

from collections.abc import Mapping
from functools import lru_cache, wraps
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fp4dit.quantization.attention_products import AttentionProducts


class _QuantizeAttentionOperands(TorchFunctionMode):
    """Context manager: fake-quantize the operands of each scaled dot-product attention."""

    def __init__(
        self, operands: Mapping[str, nn.Module], products: AttentionProducts | None
    ) -> None:
        super().__init__()
        self.operands, self.products = operands, products

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ):
        if func is F.scaled_dot_product_attention:
            arguments: dict[str, Any] = dict(kwargs or {})
            arguments |= zip(("query", "key", "value"), args, strict=False)
            query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
            if self.products is not None:
                arguments |= zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)
                return self.products(query, key, value, self.operands, **arguments)
            query = self.operands["q"](query)
            key = self.operands["k"](key)
            value = self.operands["v"](value)
            return func(query, key, value, *args[3:], **arguments)
        return func(*args, **(kwargs or {}))


class QuantProcessor(nn.Module):
    """Attention processor of diffusers that quantizes q, k and v.

    It wraps another processor and intercepts its calls of `F.scaled_dot_product_attention`. The
    quantizers therefore see the operands after normalization and rotary embeddings, as a low-bit
    attention kernel would. A scale per token is one per token and head here.

    Attributes:
        q, k, v: `FakeQuantize` of each operand, or the identity.
        products: What computes attention from the operands and their quantizers; None for
            `F.scaled_dot_product_attention`.

    Example:
        >>> attention.set_processor(QuantProcessor(attention.processor))
        >>> attention.processor.q = FakeQuantize(quantizer)
    """

    def __new__(cls, inner: Any) -> "QuantProcessor":
        return make_blank_processor(type(inner))

    products: AttentionProducts | None

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.products = inner, None
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()

    def __reduce__(self) -> tuple[Any, ...]:
        return make_blank_processor, (type(self.inner),), self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        operands = {"q": self.q, "k": self.k, "v": self.v}
        with _QuantizeAttentionOperands(operands, self.products):
            return self.inner(*args, **kwargs)


def make_blank_processor(inner: type) -> QuantProcessor:
    """Return an uninitialized processor with the call signature of class `inner`.

    `__new__` and unpickling call this function. Attention modules of diffusers inspect the
    signature of their processor's `__call__` to select the arguments that they pass. The signature
    belongs to a subclass, because torch.compile does not see one that is set on an object.
    """
    return nn.Module.__new__(processor_class_for(inner))


@lru_cache
def processor_class_for(inner: type) -> type[QuantProcessor]:
    """Return the subclass of `QuantProcessor` with the call signature of class `inner`."""

    @wraps(inner.__call__)
    def call(self: QuantProcessor, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    return type(QuantProcessor.__name__, (QuantProcessor,), {"__call__": call})
