"""Kernels of packed weights run in Triton's interpreter, and compile without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import tests
from fp4dit.numerics.formats import floating, integer
from fp4dit.packed.nn import triton_kernels, triton_ops

CASES = sorted(Path(tests.__file__).parent.rglob("interpreted_*.py"))
E2M1, E1M2, E3M0, INT4 = floating(2, 1), floating(1, 2), floating(3, 0), integer(4)


def test_results_in_the_interpreter():
    """Run all kernels, training included, in a process that interprets them from the start."""
    assert len(CASES) == 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert "skipped" not in process.stdout


@pytest.mark.parametrize(
    ("fmt", "shift", "factor"),
    [(E2M1, 2, 2**6), (E1M2, 1, 2**7), (E3M0, 3, 2**4), (INT4, 1, 2 * 2**7)],
)
def test_expand_codes(fmt, shift: int, factor: int):
    codes = torch.arange(16, dtype=torch.uint8)
    expanded = (
        triton_ops.expand_codes((codes | codes.flip(0) << 4)[:, None], shift).float() * factor
    )
    magnitudes = fmt.values()[fmt.values() >= 0]
    values = torch.cat([magnitudes, -magnitudes])
    assert expanded[:, 0].equal(values)
    assert expanded[:, 1].equal(values.flip(0))
    assert expanded.signbit().equal(torch.stack([codes > 7, codes < 8], 1))


@pytest.mark.parametrize(
    ("k", "groups", "supported"), [(1152, 9, True), (1152, 1, True), (48, 1, True), (40, 1, False)]
)
def test_supported_shapes(k: int, groups: int, supported: bool):
    assert triton_ops.is_supported_shape(k, groups) == supported


def test_unsupported_shapes_are_refused():
    x, codes = torch.zeros(1, 256), torch.zeros(4, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="256 values times 128 bytes of codes with 4 scales"):
        triton_ops.weight_only_matmul(x, codes, 2, torch.ones(4, 4), None)
    with pytest.raises(ValueError, match="64 bytes"):
        triton_ops.weight_only_matmul(x, codes[:, :64], 2, torch.ones(4, 1), None)
    with pytest.raises(ValueError, match="at most 16384"):
        triton_ops.quantize_rows(torch.zeros(1, 20000), 3, -6, 448.0, torch.int8)


def compile_kernel(kernel, types: dict[str, str], constants: dict, capability: int, **options: int):
    """Compile a kernel for an absent GPU; addresses and n are multiples of 16."""
    names = kernel.arg_names
    constant_values = {(names.index(name),): value for name, value in constants.items()}
    multiples_of_16 = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind != "i32" or name == "n"
    }
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constant_values,
        multiples_of_16,
    )
    return triton.compile(source, GPUTarget("cuda", capability, 32), options)


def read_spills(kernel, folder: Path) -> set[str]:
    """Return the bytes of stack and local memory, which registers are spilled to."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"(?:STACK|LOCAL):\d+", usage))


NO_SPILLS = {"STACK:0", "LOCAL:0"}
IN_REGISTERS = (
    r"\{[^{}]*\}, *\{[^{}]*\}, *%"  # the sum, the first operand, and the address of the second
)
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n128k"


DTYPES = {"fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8, "fp32": torch.float32}


def compile_product(capability: int, x: str, tile: triton_ops.Tile, group: int = 128):
    """Compile the product of tokens of a Triton type for an absent GPU."""
    out = "bf16" if x in ("fp8e4nv", "i8") else x
    types = {
        "x": f"*{x}",
        "codes": "*u8",
        "scale": "*fp32",
        "bias": f"*{out}",
        "out": f"*{out}",
        "m": "i32",
        "n": "i32",
    }
    constants = {
        "K": 1152,
        "GROUP": group,
        "SHIFT": 2,
        "SUM": group if x == "i8" else triton_ops.STEP,
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "STEP": triton_ops.STEP,
    }
    if x in ("fp8e4nv", "i8"):
        types["x_scale"] = "*fp32"
    else:
        constants["x_scale"] = None
    return compile_kernel(
        triton_kernels.packed_matmul_kernel,
        types,
        constants,
        capability,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=x != "i8",
    )


INT8_MMA = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"


@pytest.mark.parametrize(
    ("capability", "m", "x", "instruction"),
    [
        (90, 4096, "fp8e4nv", WGMMA + r"32\.f32\.e4m3\.e4m3 " + IN_REGISTERS),
        (90, 4096, "bf16", WGMMA + r"16\.f32\.bf16\.bf16 " + IN_REGISTERS),
        (90, 4096, "i8", WGMMA + r"32\.s32\.s8\.s8 " + IN_REGISTERS),
        (89, 4096, "fp8e4nv", r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32"),
        (89, 4096, "i8", INT8_MMA),
        (86, 4096, "i8", INT8_MMA),
        (80, 4096, "i8", INT8_MMA),
        (80, 1, "fp16", r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"),
        (80, 1, "fp32", r"fma\.rn\.f32"),
    ],
)
def test_products_compile_without_spills(
    capability: int,
    m: int,
    x: str,
    instruction: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = triton_ops.list_tiles(m, DTYPES.get(x, torch.float16))[0]
    kernel = compile_product(capability, x, tile)
    assert re.search(instruction, kernel.asm["ptx"])
    assert read_spills(kernel, tmp_path) == NO_SPILLS
    # Whole numbers have the bits of a CPU, which fuses the products with their scale.
    assert x != "i8" or "fma.rn.f32" in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("capability", "x"), [(90, "fp8e4nv"), (90, "bf16"), (80, "bf16"), (90, "i8")]
)
def test_every_tile_adds_up_in_the_same_steps(
    capability: int, x: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The width of an instruction along K is what the order of a sum depends on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    widths = set()
    for tile in triton_ops.list_tiles(4096, DTYPES.get(x, torch.float16)):
        kernel = compile_product(capability, x, tile)
        widths |= set(re.findall(r"mma\S*\.m\d+n\d+k(\d+)", kernel.asm["ptx"]))
        assert read_spills(kernel, tmp_path) == NO_SPILLS
    assert len(widths) == 1


def test_tiles_are_measured_once_for_a_shape(monkeypatch: pytest.MonkeyPatch):
    """Triton's tuner chooses the tile. Launches are recorded, because there is no GPU."""
    launched: list[tuple[int, int]] = []

    def record(self, *args, **options):
        launched.append((options["TOKENS"], options["ROWS"]))

    def time_launch(launch, **_) -> list[float]:
        launch()
        return [0.0 if launched[-1] == (128, 128) else 1.0] * 3

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(triton_ops, "do_bench", time_launch)
    triton_ops.tune_kernel.cache_clear()

    def multiply(m: int, n: int) -> list[tuple[int, int]]:
        launched.clear()
        x, codes = torch.zeros(m, 256, dtype=torch.int8), torch.zeros(n, 128, dtype=torch.uint8)
        scales = torch.ones(m), torch.ones(n, 2)
        triton_ops.quantized_matmul(x, scales[0], codes, 2, scales[1], None, torch.float16)
        return list(launched)

    assert multiply(100, 32) == [(128, 64), (128, 128), (64, 64), (128, 128)]
    assert multiply(120, 32) == [(128, 128)]
    assert len(multiply(100, 48)) == 4
    assert multiply(1, 32)[-1] == (16, 64)
    triton_ops.tune_kernel.cache_clear()


@pytest.mark.parametrize("group", [384, 1152])
def test_wide_groups_are_loaded_ahead(group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The end of a group within the loop does not keep Triton from loading ahead."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compile_product(90, "i8", triton_ops.list_tiles(4096, torch.int8)[0], group)
    loop = kernel.asm["ptx"].split("Inner Loop Header")[1]
    assert "cp.async.wait_group \t2" in loop.split("wgmma.mma_async")[0]
    assert len(re.findall(r"wgmma\.mma_async", loop)) == triton_ops.STEP // 32
    assert read_spills(kernel, tmp_path) == NO_SPILLS


FP8_VALUES = {"MANTISSA": 3, "FLOOR": 2.0**-6, "LARGEST": 448.0, "UNIT": 1.0}
WHOLE_E2M3 = {"MANTISSA": 3, "FLOOR": 1.0, "LARGEST": 7.5, "UNIT": 0.125}


@pytest.mark.parametrize(
    ("capability", "values", "fmt", "conversion"),
    [
        (90, "fp8e4nv", FP8_VALUES, "cvt.rn.satfinite.e4m3x2.f32"),
        (75, "i8", WHOLE_E2M3, "cvt.rzi.s16.f32"),
        (80, "i8", WHOLE_E2M3, "cvt.rzi.s16.f32"),
    ],
)
def test_tokens_are_quantized_with_ieee_divisions(
    capability: int,
    values: str,
    fmt: dict,
    conversion: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"K": 4608, "BLOCK": 8192, **fmt}
    types = {"x": "*bf16", "values": f"*{values}", "scales": "*fp32"}
    kernel = compile_kernel(
        triton_kernels.quantize_row_kernel, types, constants, capability, num_warps=16
    )
    assert set(re.findall(r"div\.[\w.]+", kernel.asm["ptx"])) == {"div.rn.f32"}
    assert conversion in kernel.asm["ptx"]
    assert read_spills(kernel, tmp_path) == NO_SPILLS
