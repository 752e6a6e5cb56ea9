"""Time products with a packed weight in every backend, beside the plain product."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import published
from benchmarks.timing import (
    compute_medians,
    count_tensor_bytes,
    format_header,
    format_row,
    time_in_turn,
)
from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import Granularity, PerChannel, PerGroup, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn.backends import BACKENDS, ExpandedBackend
from fp4dit.packed.nn.byte_numbers import E4M3_NUMBERS, INT8_NUMBERS, quantize_to_bytes
from fp4dit.packed.nn.expanded_backend import expand_layer_
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.packed.nn.token_quant import (
    can_use_kernels,
    fast_token_format,
    find_token_grid,
    quantize_to_grid,
)
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import make_quant_layer

PLAIN = "plain"
TOKEN_FORMATS = (E4M3, floating(3, 4), floating(2, 3))
GROUPS, ROWS = PerGroup(128), PerChannel()  # of weights in E2M1 with scales in fp16
# Whose weight is expanded before the measurement, once with a scale for each group and row.
EXPANDED = {"expanded once": GROUPS, "expanded once, a scale a row": ROWS}
PEAK_FLOPS = {"H100": 1979e12, "H200": 1979e12}  # dense FP8 operations per second of the SXM cards
# Bytes of weights that take turns, so that none of them stays in a cache, as in a model.
COLD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure.

    Args:
        shapes: shapes of weights, o x k.
        rows: numbers of tokens.
        calls: calls that are timed as one, without waiting for the device between them.
    """

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    dtypes: Sequence[torch.dtype]
    repeats: int
    calls: int


@dataclass(frozen=True)
class Product:
    """Measurement of one product.

    Args:
        backend: the name of the backend, or `PLAIN`.
        tokens: the name of the tokens' format.
        quantizing: milliseconds of quantizing the tokens alone.
        error: the error relative to the product of the same operands in fp64.
    """

    backend: str
    tokens: str
    dtype: torch.dtype
    m: int
    o: int
    k: int
    ms: float
    quantizing: float
    error: float


def list_linear_shapes(*models: str) -> list[tuple[int, int]]:
    """Return the shapes of all linear layers whose rows are divisible into groups of 128."""
    shapes = set()
    for model in models:
        with torch.device("meta"):
            transformer = published.build_random_transformer(model)
        for layer in transformer.modules():
            if isinstance(layer, nn.Linear) and layer.in_features % 128 == 0:
                shapes.add((layer.out_features, layer.in_features))
    return sorted(shapes)


@torch.no_grad()
def measure_products(sizes: Sizes, device: torch.device) -> Iterator[Product]:
    """Measure every backend for all sizes."""
    for (o, k), dtype in itertools.product(sizes.shapes, sizes.dtypes):
        plain = nn.Linear(k, o, device=device, dtype=dtype)
        layers = {granularity: pack_linear(plain, granularity) for granularity in (GROUPS, ROWS)}
        for m in sizes.rows:
            x = torch.randn(m, k, device=device, dtype=dtype)
            yield from time_backends(plain, layers, x, sizes)


def pack_linear(plain: nn.Linear, granularity: Granularity) -> PackedLinear:
    """Return the packed counterpart of a linear layer."""
    quantizer = Quantizer(floating(2, 1), granularity, AbsMax(fp16))
    quantized = make_quant_layer(deepcopy(plain), quantizer)
    quantized.prepare().commit_weight()
    return pack_layer(quantized)


Contenders = dict[tuple[str, str], tuple[Callable[..., Tensor], nn.Linear]]


def time_backends(
    plain: nn.Linear,
    layers: Mapping[Granularity, PackedLinear],
    x: Float[Tensor, "m k"],
    sizes: Sizes,
) -> Iterator[Product]:
    """Measure the plain product, and that of every backend and format that supports a layer."""
    products: Contenders = {(PLAIN, ""): (nn.Linear.forward, plain)}
    quantizing: dict[str, Callable[[], object]] = {}
    for fmt in TOKEN_FORMATS:
        fake_quant = FakeQuantize(Quantizer(fmt, PerToken()))
        for layer in layers.values():
            layer.input_fake_quant = fake_quant
        quantizing[fmt.name] = partial(quantize_tokens_alone, deepcopy(layers[GROUPS]), x)
        products |= list_contenders(layers, x, fmt.name)
    runs: dict[Any, Callable[[], object]] = dict(quantizing)
    for key, (multiply, module) in products.items():
        runs[key] = cycle_weights(multiply, module, x)
    times = compute_medians(time_in_turn(runs, sizes.repeats, x.device, sizes.calls))
    for key, (multiply, module) in products.items():
        reference = multiply_exactly(module, x)
        error = (multiply(module, x).double() - reference).norm() / reference.norm()
        alone = times.get(key[1], 0.0)
        yield Product(*key, x.dtype, len(x), *plain.weight.shape, times[key], alone, error.item())


def list_contenders(
    layers: Mapping[Granularity, PackedLinear], x: Float[Tensor, "m k"], tokens: str
) -> Contenders:
    """Return every backend that supports tokens of a format, with a copy of its layer, by name."""
    contenders: Contenders = {}
    layer = deepcopy(layers[GROUPS])
    for backend in BACKENDS:
        if backend.supports(layer, x):
            contenders[backend.name, tokens] = (backend, layer)
    for name, granularity in EXPANDED.items():
        expanded = deepcopy(layers[granularity])
        if expand_layer_(expanded) and ExpandedBackend().supports(expanded, x):
            contenders[name, tokens] = (ExpandedBackend(), expanded)
    return contenders


def cycle_weights(
    multiply: Callable[..., Tensor], module: nn.Linear, x: Float[Tensor, "m k"]
) -> Callable[[], Tensor]:
    """Return a function that multiplies by one of many equal weights after the other.

    None of the weights is in a cache when its turn comes.
    """
    count = COLD_BYTES // count_tensor_bytes(module)
    copies = cycle([module, *(deepcopy(module) for _ in range(count))])
    return lambda: multiply(next(copies), x)


def quantize_tokens_alone(layer: PackedLinear, x: Float[Tensor, "m k"]) -> object:
    """Quantize tokens by the kernel of a backend, or else as the simulation does."""
    if can_use_kernels(x):
        grid = find_token_grid(layer.input_fake_quant, layer.in_features)
        assert grid is not None
        return quantize_to_grid(layer.input_fake_quant, x, grid)
    fmt = fast_token_format(layer.input_fake_quant)
    for numbers in (INT8_NUMBERS, E4M3_NUMBERS):
        if x.is_cuda and fmt is not None and numbers.hold(fmt):
            return quantize_to_bytes(x, fmt, numbers)
    return layer.input_fake_quant(x)


def multiply_exactly(module: nn.Linear, x: Float[Tensor, "m k"]) -> Float[Tensor, "m o"]:
    """Return the product in fp64, of operands that are not rounded to less than fp32."""
    if isinstance(module, PackedLinear):
        x, weight = module.input_fake_quant(x.float()), module.dequantize(torch.float32)
    else:
        weight = module.weight
    bias = None if module.bias is None else module.bias.double()
    return F.linear(x.double(), weight.double(), bias)


def format_products(products: Sequence[Product], card: str) -> Iterator[str]:
    """Yield the lines of a Markdown table.

    It has a column for the share of the FP8 peak if the peak of the card is known.
    """
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)
    columns = ["o x k", "rows", "dtype", "product", "tokens", "ms", "times the speed of plain"]
    if peak:
        columns.append("of FP8 peak")
    yield from format_header(*columns, "quantizing alone, ms", "error")
    plain_ms = {(p.dtype, p.m, p.o, p.k): p.ms for p in products if p.backend == PLAIN}
    for p in products:
        dtype = str(p.dtype).removeprefix("torch.")
        speed = plain_ms[p.dtype, p.m, p.o, p.k] / p.ms
        cells = [f"{p.o} x {p.k}", f"{p.m}", dtype, p.backend, p.tokens]
        cells += [f"{p.ms:.3f}", f"{speed:.2f}"]
        if peak:
            cells.append(f"{2 * p.m * p.o * p.k / p.ms / 1e-3 / peak:.0%}")
        quantizing = "" if p.backend == PLAIN else f"{p.quantizing:.3f}"
        yield format_row(*cells, quantizing, f"{p.error:.1e}")
