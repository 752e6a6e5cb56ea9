"""Quantized attention: queries, keys and values as they enter the product, whatever model computes them."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Intercept(TorchFunctionMode):
    """Quantizes the operands of every scaled dot product inside the block."""

    def __init__(self, operands: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.operands = operands

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            for name in names:
                given[name] = self.operands[name[0]](given[name])
            return func(*(given.pop(name) for name in names), *args[3:], **given)
        return func(*args, **(kwargs or {}))


class QuantProcessor(nn.Module):
    """An attention processor of diffusers whose product sees quantized q, k and v: one scale per token and head.

    Intercepting the product, not the projections, puts the quantizers behind normalisation and rotary
    embeddings, where a low-bit product would read its operands.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()

    @property
    def __call__(self) -> Callable[..., Any]:
        """With the signature of the inner processor, where attention looks up which arguments to pass on."""
        return wraps(self.inner.__call__)(partial(super().__call__))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Intercept({"q": self.q, "k": self.k, "v": self.v}):
            return self.inner(*args, **kwargs)
