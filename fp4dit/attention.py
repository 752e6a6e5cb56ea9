"""Quantized attention: queries, keys and values as they enter the product, whatever model computes them."""

from collections.abc import Mapping
from functools import lru_cache, wraps
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

    def __new__(cls, inner: Any) -> "QuantProcessor":
        return like(type(inner))

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()

    def __reduce__(self) -> tuple[Any, ...]:
        return like, (type(self.inner),), self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Intercept({"q": self.q, "k": self.k, "v": self.v}):
            return self.inner(*args, **kwargs)


def like(inner: type) -> QuantProcessor:
    """A blank one, called with the signature of this class: attention looks there for which arguments to pass on, and
    torch.compile does not see it where it is made for each object."""
    kind = called_like(inner)
    return nn.Module.__new__(kind)


@lru_cache
def called_like(inner: type) -> type[QuantProcessor]:
    @wraps(inner.__call__)
    def call(self: QuantProcessor, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    return type(QuantProcessor.__name__, (QuantProcessor,), {"__call__": call})
