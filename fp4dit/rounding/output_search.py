"""Search of formats and ranges by the error of each layer's output (LLM-FP4, arXiv:2310.16836).

The error of a candidate for the weight is computed from products of the layer's inputs, at a cost
that does not depend on the number of tokens. The error of a candidate for a static input is
measured on a sample of tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.layer_inputs import iter_layer_inputs
from fp4dit.numerics.format_selection import FormatSelection
from fp4dit.numerics.formats import Format, exponent_and_mantissa_bits
from fp4dit.numerics.qparams import QParams, merge_qparams
from fp4dit.numerics.quantizer import PerInputChannel, Quantizer
from fp4dit.numerics.scale_rules import fix_tensor_scale, quantize_blocks
from fp4dit.quantization.fake_quant import FakeQuantize, candidate_formats
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.observers import PerChannelMinMaxObserver
from fp4dit.rounding.base import Curve, RoundingMethod
from fp4dit.rounding.resume import iter_unfinished_layers
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import ResumableTrainers

Tokens = Float[Tensor, "n k"]


@runtime_checkable
class RangeCandidates(Protocol):
    """Protocol of functions that yield the ranges to try, from the largest absolute value.

    Example:
        >>> def try_halves(largest, fmt):
        ...     yield from (largest, largest / 2)
        >>> search = OutputSearch(candidates=try_halves)
    """

    def __call__(
        self, largest: Float[Tensor, "*n"], fmt: Format
    ) -> Iterator[Float[Tensor, "*n"]]: ...


@dataclass(frozen=True)
class LinearGrid:
    """Evenly spaced shares of the largest absolute value.

    Args:
        lowest: The least share.
        highest: The largest share. Above 1, the range is wider than the values.
        count: The number of shares.

    Example:
        >>> list(LinearGrid(0.5, 1.0, count=2)(torch.tensor([8.0]), fmt))
        [tensor([4.]), tensor([8.])]
    """

    lowest: float = 0.1
    highest: float = 1.2
    count: int = 111

    def __call__(self, largest: Float[Tensor, "*n"], fmt: Format) -> Iterator[Float[Tensor, "*n"]]:
        for ratio in torch.linspace(self.lowest, self.highest, self.count).tolist():
            yield largest * ratio


@dataclass(frozen=True)
class BiasMultiples:
    """Multiples of the exponent bias that the largest absolute value amounts to.

    The authors of LLM-FP4 search these (arXiv:2310.16836). With E exponent bits, M mantissa bits
    and a real-valued bias b, the largest value of a format is 2^(2^E - 1 - b) (2 - 2^-M). The
    candidates depend on the absolute size of the values, because a multiple of b is no multiple of
    the range.

    Args:
        lowest: The least multiple.
        highest: The end of the multiples, which is not one of them, as in the authors' code.
        count: The number of multiples.

    Example:
        >>> list(BiasMultiples(1.0, 2.0, count=2)(torch.tensor([6.0]), floating(2, 1)))
        [tensor([6.]), tensor([4.2426])]
    """

    lowest: float = 0.01
    highest: float = 1.2
    count: int = 100

    def __call__(self, largest: Float[Tensor, "*n"], fmt: Format) -> Iterator[Float[Tensor, "*n"]]:
        exponent, mantissa = exponent_and_mantissa_bits(fmt)
        top = 2.0**exponent - 1 + math.log2(2 - 2.0**-mantissa)
        bias = top - largest.log2()
        for i in range(self.count):
            multiple = self.lowest + i * (self.highest - self.lowest) / self.count
            yield torch.exp2(top - multiple * bias)


@dataclass(frozen=True)
class OutputSearch(RoundingMethod):
    """Search formats and ranges by the error of each layer's output (LLM-FP4, arXiv:2310.16836).

    A round first tries all formats of the weight, with all candidate ranges of each output channel,
    and keeps the quantizer of the input. If the input is static, the round then tries its formats
    and ranges with the new quantizer of the weight. The current choice is always among the
    candidates, and the search ends after a round that does not reduce the error. Each layer is
    searched independently.

    Args:
        candidates: The ranges to try.
        rounds: The largest number of rounds.
        tokens: The number of tokens of a layer's input that errors are measured on.
        batch_size: The number of calibration rows of a forward pass.

    Example:
        >>> OutputSearch(LinearGrid(0.1, 1.2, count=23), rounds=3)
    """

    candidates: RangeCandidates = field(default_factory=LinearGrid)
    rounds: int = 3
    tokens: int = 512
    batch_size: int = 16

    def check(self, layers: Sequence[QuantLayer]) -> None:
        """Raise an error if a layer's format is selected per block.

        Raises:
            UserError: for the first such layer.
        """
        for layer in layers:
            fmt = layer.weight_fake_quant.quantizer.format
            if isinstance(fmt, FormatSelection) and fmt.per == "block":
                raise UserError(
                    f"rounding=output_search finds one format for a layer, and {fmt.name} is "
                    "selected per block: select it per tensor, or choose another rounding"
                )

    def round_unit(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        dataset: UnitDataset,
        trainers: ResumableTrainers,
    ) -> Curve:
        samples = self.sample_tokens(module, layers, dataset)
        for number, layer in iter_unfinished_layers(module, layers, trainers):
            if (sample := samples[number]) is not None:
                self.search_layer(layer, *sample)
            layer.commit_weight()
        return []

    def sample_tokens(
        self, module: nn.Module, layers: list[QuantLayer], dataset: UnitDataset
    ) -> list[tuple[Tokens, Float[Tensor, "2 k"]] | None]:
        """Sample tokens of each layer's unquantized input, evenly spread over the training rows.

        Returns:
            For each layer the tokens, and the smallest and largest value of each channel over all
            rows, which a sample rarely holds; None for a layer that is not reached.
        """
        quantizers = [layer.input_fake_quant for layer in layers]
        for layer in layers:
            layer.input_fake_quant = nn.Identity()
        rows = dataset.train_rows
        per_batch = max(1, self.tokens // math.ceil(len(rows) / self.batch_size))
        observer = PerChannelMinMaxObserver(per_batch)
        summaries: list[list[Tokens]] = [[] for _ in layers]
        for inputs in iter_layer_inputs(module, layers, dataset, rows, self.batch_size):
            for layer_summaries, x in zip(summaries, inputs, strict=True):
                if x is not None:
                    layer_summaries.append(observer.summarize(x))
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.input_fake_quant = quantizer
        samples = []
        for layer_summaries in summaries:
            merged = observer.merge(layer_summaries) if layer_summaries else None
            # The first two rows are the extremes of each channel.
            samples.append(None if merged is None else (merged[2:], merged[:2]))
        return samples

    @torch.no_grad()
    def search_layer(self, layer: QuantLayer, x: Tokens, extremes: Float[Tensor, "2 k"]) -> None:
        """Choose the formats and qparams of the weight and of a static input, in turn."""
        weight, quantize_input = layer.weight_matrix.float(), layer.input_fake_quant
        x, extremes = x.to(weight.device), extremes.to(weight.device)
        target, least = x @ weight.T, torch.inf
        for _ in range(self.rounds):
            self.search_weight(layer.weight_fake_quant, weight, x, quantize_input(x))
            weight_hat = layer.weight_fake_quant(weight)
            if isinstance(quantize_input, FakeQuantize) and quantize_input.static:
                self.search_input(quantize_input, x, extremes, weight_hat, target)
            error = (quantize_input(x) @ weight_hat.T - target).square().sum().item()
            if error >= least:
                return
            least = error

    def search_weight(
        self, fake_quant: FakeQuantize, weight: Float[Tensor, "o k"], x: Tokens, x_hat: Tokens
    ) -> None:
        """Choose the format of least error over all channels, with each channel's best range.

        The error of a channel, |x_hat w_hat - x w|^2, is computed from the products of the inputs,
        so that its cost does not depend on the number of tokens.

        Args:
            fake_quant: The quantizer of the weight.
            weight: The weight in full precision.
            x: The sampled tokens in full precision.
            x_hat: The sampled tokens, quantized.
        """
        gram, cross = x_hat.T @ x_hat, x_hat.T @ x
        constant = ((weight @ (x.T @ x)) * weight).sum(1)
        blocks = fake_quant.quantizer.granularity.split(weight)
        # A candidate is chosen for each output channel, or for a whole tensor with one scale. All
        # blocks of an output channel take the same candidate.
        num_choices = min(len(blocks), len(weight))

        def compute_error(qparams: QParams, fmt: Format) -> Float[Tensor, "choices"]:
            w_hat = quantize_blocks(blocks, qparams, fmt).view_as(weight)
            mixed = ((w_hat @ cross) * weight).sum(1)
            row_errors = ((w_hat @ gram) * w_hat).sum(1) - 2 * mixed + constant
            return row_errors.view(num_choices, -1).sum(1)

        trials = []
        for i, fmt in enumerate(candidate_formats(fake_quant.quantizer)):
            best = get_qparams(fake_quant, i) or fake_quant.quantizer.scale(blocks, fmt)
            least = compute_error(best, fmt)
            for qparams in self.iter_qparams(fake_quant.quantizer, blocks, fmt):
                error = compute_error(qparams, fmt)
                better = (error < least).repeat_interleave(len(blocks) // num_choices)[:, None]
                least = torch.minimum(error, least)
                best = merge_qparams(better, qparams, best)
            trials.append((least.sum().item(), i, best))
        set_least_error(fake_quant, trials)

    def search_input(
        self,
        fake_quant: FakeQuantize,
        x: Tokens,
        extremes: Float[Tensor, "2 k"],
        weight: Float[Tensor, "o k"],
        target: Float[Tensor, "n o"],
    ) -> None:
        """Choose the input's format and range of least error for these tokens.

        Args:
            fake_quant: The quantizer of the input.
            x: The sampled tokens in full precision.
            extremes: The smallest and largest value of each channel over all calibration rows.
                Candidate ranges are shares of their range.
            weight: The quantized weight.
            target: The products of the tokens and the weight in full precision.
        """
        split = fake_quant.quantizer.granularity.split
        blocks, extreme_blocks = split(x), split(extremes)
        trials = []
        for i, fmt in enumerate(candidate_formats(fake_quant.quantizer)):
            start = get_qparams(fake_quant, i) or fake_quant.quantizer.scale(extreme_blocks, fmt)
            for qparams in [start, *self.iter_qparams(fake_quant.quantizer, extreme_blocks, fmt)]:
                x_hat = quantize_blocks(blocks, qparams, fmt).view_as(x)
                error = (x_hat @ weight.T - target).square().sum().item()
                trials.append((error, i, qparams))
        set_least_error(fake_quant, trials)

    def iter_qparams(
        self, quantizer: Quantizer, blocks: Float[Tensor, "b k"], fmt: Format
    ) -> Iterator[QParams]:
        """Yield the qparams of each candidate range.

        They are what the scale rule returns for the blocks multiplied so that they have the range.
        """
        if isinstance(quantizer.granularity, PerInputChannel):  # all rows share one range
            largest = blocks.abs().amax().view(1, 1)
        else:
            largest = blocks.abs().amax(1, keepdim=True)
        rule = fix_tensor_scale(quantizer.scale, blocks)
        smallest = torch.finfo(largest.dtype).tiny
        for candidate in self.candidates(largest, fmt):
            yield rule(blocks * (candidate / largest.clamp(min=smallest)), fmt)


def get_qparams(fake_quant: FakeQuantize, format_index: int) -> QParams | None:
    """Return the current qparams if they belong to the candidate format of this index."""
    selected = fake_quant.calibrated_tensors().get("choice", torch.zeros(1))
    return fake_quant.qparams if int(selected.flatten()[0]) == format_index else None


def set_least_error(fake_quant: FakeQuantize, trials: Sequence[tuple[float, int, QParams]]) -> None:
    """Set the format and the qparams of the trial (error, format index, qparams) of least error."""
    _, format_index, qparams = min(trials, key=lambda trial: trial[0])
    if isinstance(fake_quant.quantizer.format, FormatSelection):
        fake_quant.register_buffer("choice", torch.full((1, 1), format_index, dtype=torch.uint8))
    fake_quant.set_qparams(qparams)
