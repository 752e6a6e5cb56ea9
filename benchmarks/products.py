"""Products of some rows with one packed weight, in every way that takes it, beside the plain product."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import published
from benchmarks.markdown import head, row
from benchmarks.packing import E2M1
from benchmarks.timing import in_turn, medians
from fp4dit.blockscales import E4M3
from fp4dit.grid import Grid
from fp4dit.layer import wrap
from fp4dit.packed.layer import PackedLinear, packed
from fp4dit.packed.matmul import BACKENDS, Fp8
from fp4dit.packed.speeds import Speed, device_name
from fp4dit.quantizer import Granularity, Quantizer

PLAIN = "plain"
PEAKS = {"H100": 1979e12, "H200": 1979e12}  # FP8 operations a second, dense, of the SXM cards
COLD = 64 * 2**20  # bytes: so many weights in turn leave none of them in a cache, as a model's layers do


@dataclass(frozen=True)
class Sizes:
    """`shapes` are of weights, o x k; `calls` are timed as one, with no wait for the device between them."""

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    dtypes: Sequence[torch.dtype]
    repeats: int
    calls: int


@dataclass(frozen=True)
class Product:
    """A way, its time, and how far it is from the product in fp64 of the very operands, relative to that.

    `quantizing` is how long quantizing its tokens takes alone.
    """

    way: str
    dtype: torch.dtype
    m: int
    o: int
    k: int
    ms: float
    quantizing: float
    error: float


def shapes(*models: str) -> list[tuple[int, int]]:
    """Of all linear layers whose rows groups of 128 divide, as most do."""
    with torch.device("meta"):
        layers = [layer for model in models for layer in published.build(model).modules()]
    found = {(layer.out_features, layer.in_features) for layer in layers if isinstance(layer, nn.Linear)}
    return sorted(shape for shape in found if shape[1] % 128 == 0)


@torch.no_grad()
def measure(sizes: Sizes, device: torch.device) -> Iterator[Product]:
    for (o, k), dtype in itertools.product(sizes.shapes, sizes.dtypes):
        plain, layer = layers(o, k, dtype, device)
        for m in sizes.rows:
            yield from of(plain, layer, torch.randn(m, k, device=device, dtype=dtype), sizes)


def layers(o: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[nn.Linear, PackedLinear]:
    """One at random, and what it is packed."""
    plain = nn.Linear(k, o, device=device, dtype=dtype)
    quantized = wrap(deepcopy(plain), E2M1)
    quantized.prepare().freeze()
    layer = packed(quantized)
    layer.activation = Grid(Quantizer(E4M3, Granularity("row")))
    return plain, layer


def of(plain: nn.Linear, layer: PackedLinear, x: Float[Tensor, "m k"], sizes: Sizes) -> Iterator[Product]:
    own = {PLAIN: (nn.Linear.forward, plain)}
    own |= {backend.name: (backend, layer) for backend in BACKENDS if backend.takes(layer, x)}
    ways = {name: turning(way, module, x) for name, (way, module) in own.items()}
    times = medians(in_turn(ways | {"": lambda: quantize(layer, x)}, sizes.repeats, x.device, sizes.calls))
    for name, (way, module) in own.items():
        wanted = exact(module, x)
        error = (way(module, x).double() - wanted).norm() / wanted.norm()
        o, k = layer.weight.shape
        yield Product(name, x.dtype, len(x), o, k, times[name], times[""], error.item())


def turning(way: Callable[..., Tensor], module: nn.Linear, x: Float[Tensor, "m k"]) -> Callable[[], Tensor]:
    """The product with one of many such weights after the other, none of which is in a cache when its turn comes."""
    size = sum(value.nbytes for value in module.state_dict().values())
    copies = cycle([module, *(deepcopy(module) for _ in range(COLD // size))])
    return lambda: way(next(copies), x)


def quantize(layer: PackedLinear, x: Float[Tensor, "m k"]) -> object:
    """The tokens, as the way for FP8 does it, or else as the simulation."""
    if not Fp8().takes(layer, x):
        return layer.activation(x)
    from fp4dit.packed import kernels  # which needs triton

    return kernels.quantize_rows(x, E4M3.mantissa, E4M3.min_exponent, E4M3.max)


def exact(module: nn.Linear, x: Float[Tensor, "m k"]) -> Float[Tensor, "m o"]:
    """In fp64. Tokens and packed weights are numbers of fp32 before anything makes them coarser."""
    if isinstance(module, PackedLinear):
        x, weight = module.activation(x.float()), module.dense(torch.float32)
    else:
        weight = module.weight
    bias = None if module.bias is None else module.bias.double()
    return F.linear(x.double(), weight.double(), bias)


def lines(found: Sequence[Product], card: str) -> Iterator[str]:
    """Markdown. Of a card whose peak is known, its share."""
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    columns = ("ms", "of plain", *(("of FP8 peak",) if peak else ()), "quantizing alone, ms", "error")
    yield from head("o x k", "rows", "dtype", "product", *columns)
    plain = {(p.dtype, p.m, p.o, p.k): p.ms for p in found if p.way == PLAIN}
    for p in found:
        share = [f"{2 * p.m * p.o * p.k / p.ms / 1e-3 / peak:.0%}"] if peak else []
        quantizing = "" if p.way == PLAIN else f"{p.quantizing:.3f}"
        cells = [f"{p.o} x {p.k}", f"{p.m}", str(p.dtype).removeprefix("torch."), p.way, f"{p.ms:.3f}"]
        yield row(*cells, f"{p.ms / plain[p.dtype, p.m, p.o, p.k]:.2f}", *share, quantizing, f"{p.error:.1e}")


def speeds(found: Sequence[Product], device: torch.device) -> list[Speed]:
    """Rows of fp4dit/packed/speeds.json. They say nothing of dtypes: what is measured in bf16 goes in."""
    name, of_16_bits = device_name(device), [p for p in found if p.dtype == torch.bfloat16]
    ways = {PLAIN: "16-bit"}
    return [Speed(name, ways.get(p.way, p.way), p.m, p.o, p.k, round(p.ms, 5)) for p in of_16_bits]
