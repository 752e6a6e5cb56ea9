"""Compare the speed of quantization with torchao and ml_dtypes: `python -m benchmarks.quantize`.

Weights are quantized and dequantized. The unit is GB/s of fp32 read and written (8 bytes for each
value) on one core, scales included where there are any. The time is that of the core, the median
of 5 runs, so that other programs on the machine hardly matter. All numbers of a line are of one
run.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.formats import floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.numerics.shared_mantissa import SharedMantissa

SHAPE, REPEATS = (4096, 4608), 5
GROUP, ROW = PerGroup(128), PerChannel()
Run = Callable[[Tensor], object]

OURS: dict[str, Run] = {
    "memory copy": torch.clone,
    "E2M1, no scale": floating(2, 1).nearest,
    "E2M3, no scale": floating(2, 3).nearest,
    "E4M3, no scale": floating(4, 3, reserved=1).nearest,
    "INT4 affine g128": Quantizer(integer(4, signed=False), GROUP, MinMax(fp16)),
    "E2M1 g128": Quantizer(floating(2, 1), GROUP, AbsMax(fp16)),
    "E2M3 token": Quantizer(floating(2, 3), ROW),
    "E3M4 token": Quantizer(floating(3, 4), ROW),
    "NF4 g128": Quantizer(nf4, GROUP, AbsMax(fp16)),
    "E2M3 shared by 3": Quantizer(SharedMantissa(floating(2, 3), 3), ROW),
    "MXFP4": Quantizer(floating(2, 1), PerGroup(32), E8M0Scale()),
    "NVFP4": Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale()),
}


def make_ml_dtypes_runs() -> dict[str, Run]:
    """Return the formats that ml_dtypes can cast to."""
    import ml_dtypes

    def cast(dtype: type) -> Run:
        return lambda x: x.numpy().astype(dtype).astype("float32")

    return {
        "E2M1, no scale": cast(ml_dtypes.float4_e2m1fn),
        "E2M3, no scale": cast(ml_dtypes.float6_e2m3fn),
    }


def make_torch_runs() -> dict[str, Run]:
    """Return the formats that torch can cast to."""
    return {"E4M3, no scale": lambda x: x.to(torch.float8_e4m3fn).float()}


def make_torchao_runs() -> dict[str, Run]:
    """Return the formats that torchao can quantize to."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.quantization import quant_primitives as q
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    def affine(x: Tensor) -> Tensor:
        kind, block = q.MappingType.ASYMMETRIC, (1, 128)
        scale, zero = q.choose_qparams_affine(x, kind, block, torch.uint8, 0, 15)  # pyright: ignore[reportArgumentType]
        codes = q.quantize_affine(x, block, scale, zero, torch.uint8, 0, 15)
        return q.dequantize_affine(codes, block, scale, zero, torch.uint8, 0, 15)

    def nvfp4(x: Tensor) -> Tensor:
        scale = per_tensor_amax_to_scale(x.abs().amax())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    return {
        "INT4 affine g128": affine,
        "NF4 g128": lambda x: to_nf4(x, 128).get_original_weight(),
        "MXFP4": lambda x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32),
        "NVFP4": nvfp4,
    }


def measure_throughput(run: Run, x: Tensor) -> float:
    """Return the throughput in GB/s."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.process_time()
        run(x)
        seconds.append(time.process_time() - start)
    return 8e-9 * x.numel() / statistics.median(seconds[1:])


@torch.no_grad()
def main() -> None:
    """Print a line for each format."""
    torch.set_num_threads(1)
    peers: dict[str, dict[str, Run]] = {}
    for name, load in {
        "ml_dtypes": make_ml_dtypes_runs,
        "torch": make_torch_runs,
        "torchao": make_torchao_runs,
    }.items():
        try:
            peers[name] = load()
        except ImportError as error:
            print(f"without {name}: {error}")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) / 50
    print(f"{'GB/s':20}{'fp4dit':>10}" + "".join(f"{name:>12}" for name in peers))
    for name, ours in OURS.items():
        theirs = [
            f"{measure_throughput(runs[name], x):12.2f}" if name in runs else f"{'-':>12}"
            for runs in peers.values()
        ]
        print(f"{name:20}{measure_throughput(ours, x):10.2f}" + "".join(theirs), flush=True)


if __name__ == "__main__":
    main()
