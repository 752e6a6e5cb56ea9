"""Clipping of each token before its dynamic scale is computed, by a share that is searched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.transforms.base import (
    FakeQuantizeFn,
    InputSample,
    Transform,
    WeightMatrix,
    apply_in_fp32,
    squared_output_error,
)


class TimestepHolder(Protocol):
    """Protocol of what knows the timestep of each row of the current batch."""

    timestep: Float[Tensor, "n"]


class TokenClip(Transform):
    """Clip the values of each token at a share of the largest one.

    A dynamic absmax scale is then that share of what it was: large values saturate, and all others
    have finer steps. The share depends on the range of timesteps. Unlike other transforms, this
    one changes the product; it is for quantized inputs only.

    Args:
        range_ends: Last timestep of each range but the last one, ascending.
        shares: Shares to try, the first of which is kept until `fit`.

    Example:
        >>> clip = TokenClip(range_ends=[500], shares=[1.0, 0.9, 0.8])
        >>> clip.context = context  # a `TimestepContext`
        >>> clip.fit(weight, x, quantizer, fake_quantize_input)
        >>> clipped = clip.transform_input(x)
    """

    needs_timestep: ClassVar[bool] = True

    share: Float[Tensor, "r"]

    def __init__(self, range_ends: Sequence[int | float], shares: Sequence[float]) -> None:
        super().__init__()
        self.shares = tuple(shares)
        self.context: TimestepHolder | None = None
        self.range_ends = torch.tensor(range_ends, dtype=torch.float32, device="cpu")
        share = torch.full((len(range_ends) + 1,), self.shares[0], dtype=torch.float16)
        self.register_buffer("share", share)

    def range_index(self, rows: int) -> Int[Tensor, "n"]:
        """Return the range of timesteps of each of so many rows."""
        if self.context is None or len(self.share) == 1:
            return torch.zeros(rows, dtype=torch.int64)
        timestep = self.context.timestep.float().cpu()
        index = torch.bucketize(timestep, self.range_ends)
        if rows % len(index):
            index = index[:1]
        # A layer may read several vectors for each row of a batch.
        return index.repeat_interleave(rows // len(index))

    @torch.no_grad()
    def fit(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> None:
        weight, index = weight.float(), self.range_index(len(x))
        for i in range(len(self.share)):
            calls = x.float()[(index == i).to(x.device)]

            def output_error(share: float, calls: Tensor = calls) -> float:
                x_hat = fake_quantize_input(clip_tokens(calls, torch.tensor(share)))
                return squared_output_error(calls, weight, x_hat, weight)

            if len(calls):
                self.share[i] = min(self.shares, key=output_error)

    def transform_input(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        index = self.range_index(len(x) if x.ndim > 1 else 1).to(self.share.device)
        share = self.share.float()[index]
        share = share.view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else share
        return apply_in_fp32(lambda x: clip_tokens(x, share.to(x.dtype)), x)


def clip_tokens(x: Float[Tensor, "*b k"], share: Float[Tensor, "..."]) -> Float[Tensor, "*b k"]:
    """Return tokens whose magnitudes are at most `share` of the largest of each."""
    limit = share * x.abs().amax(-1, keepdim=True)
    return torch.minimum(torch.maximum(x, -limit), limit)


@dataclass(frozen=True)
class TokenClipSearch:
    """Clip each token at the share of its largest value with the least error of the layer's output.

    The shares are searched for each layer and each range of timesteps, evenly spaced from `lowest`
    to 1. The search needs inputs that are quantized while weights are rounded, with one scale per
    token (``quantize_inputs_while_rounding: ${activation}``); else it keeps 1.

    Args:
        range_ends: Last timestep of each range but the last one, ascending. Ranges without
            calibration calls keep a share of 1.
        lowest: Least share.
        candidates: Number of shares.

    Example:
        >>> TokenClipSearch(range_ends=[250, 500, 750])(out=32, k=64).storage_bits()
        64.0
    """

    range_ends: Sequence[int | float] = ()
    lowest: float = 0.5
    candidates: int = 11

    def __call__(self, out: int, k: int) -> TokenClip:
        if not 0 < self.lowest <= 1 or self.candidates < 1:
            raise ValueError(
                f"there are no shares to search: lowest={self.lowest} is to be above 0 and at "
                f"most 1, and candidates={self.candidates} at least 1."
            )
        if sorted(set(self.range_ends)) != list(self.range_ends):
            raise ValueError(f"range_ends={list(self.range_ends)} have to ascend.")
        shares = torch.linspace(1, self.lowest, self.candidates, dtype=torch.float64, device="cpu")
        return TokenClip(self.range_ends, shares.tolist())
