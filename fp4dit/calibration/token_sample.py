"""A seeded sample of the tokens of calls, for what is fitted to tokens and not to sequences."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class TokenSample:
    """Sample of the tokens of each call, drawn without replacement.

    Every token of a sequence of T tokens is drawn with the probability m / T, where m is the
    smaller one of `count` and T. A sum over the drawn tokens times T / m is therefore an unbiased
    estimate of the sum over all tokens (Horvitz and Thompson, 1952). If a sequence has no more than
    `count` tokens, all of them are taken, in their order.

    Args:
        count: Largest number of tokens of a row.
        seed: Another seed draws other tokens.

    Example:
        >>> sample = TokenSample(count=2)
        >>> rows = sample.select_rows(torch.randn(8, 4096, 64), torch.arange(8))
        >>> rows.shape, sample.factor(4096)
        (torch.Size([8, 2, 64]), 2048.0)
    """

    count: int
    seed: int = 0

    def draw(self, length: int, *key: float | int) -> Int[Tensor, "m"]:
        """Return the numbers of the drawn tokens in ascending order.

        Args:
            length: The number of tokens.
            key: Numbers that name the row or the call: the same key draws the same tokens.
        """
        if length <= self.count:
            return torch.arange(length)
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(length, generator=generator)[: self.count].sort().values

    def factor(self, length: int) -> float:
        """Return what turns a sum over the drawn tokens into an estimate of the whole sum."""
        return length / min(length, self.count)

    def select_rows(
        self, x: Shaped[Tensor, "n t k"], numbers: Int[Tensor, "n"]
    ) -> Shaped[Tensor, "n m k"]:
        """Return tokens of each row, which are others for each row.

        Args:
            x: The tokens of all rows.
            numbers: The number of each row among all rows, which names it whatever the batch.
        """
        length = x.shape[1]
        if length <= self.count:
            return x
        drawn = torch.stack([self.draw(length, number) for number in numbers.tolist()])
        return x[torch.arange(len(x), device=x.device)[:, None], drawn.to(x.device)]

    def select_call(self, x: Shaped[Tensor, "..."], *key: float | int) -> Shaped[Tensor, "..."]:
        """Return tokens of a call, which are the same for all rows and heads.

        Args:
            x: The tokens, in the dimension before the last one. Vectors without a dimension of
                tokens are returned unchanged.
            key: Numbers that name the call.
        """
        if x.ndim < 3 or x.shape[-2] <= self.count:
            return x
        return x.index_select(-2, self.draw(x.shape[-2], *key).to(x.device))
