"""Kernels of packed weights: what they compute, in Triton's interpreter, and what they compile to, without a GPU."""

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

from fp4dit.formats import floating, integer
from fp4dit.packed import kernels, programs

CASES = sorted(Path(__file__).parent.glob("interpreted_*.py"))
E2M1, E1M2, E3M0, INT4 = floating(2, 1), floating(1, 2), floating(3, 0), integer(4)


def test_what_they_compute():
    """Those of training too, in a process of its own: that kernels are interpreted is settled when they are defined."""
    assert len(CASES) == 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("fmt", "shift", "factor"), [(E2M1, 2, 2**6), (E1M2, 1, 2**7), (E3M0, 3, 2**4), (INT4, 1, 2 * 2**7)]
)
def test_every_code_becomes_its_value(fmt, shift: int, factor: int):
    codes = torch.arange(16, dtype=torch.uint8)
    found = kernels.expand((codes | codes.flip(0) << 4)[:, None], shift).float() * factor
    magnitudes = fmt.values()[fmt.values() >= 0]
    values = torch.cat([magnitudes, -magnitudes])
    assert found[:, 0].equal(values)
    assert found[:, 1].equal(values.flip(0))
    assert found.signbit().equal(torch.stack([codes > 7, codes < 8], 1))


@pytest.mark.parametrize(("k", "groups", "takes"), [(1152, 9, True), (1152, 1, True), (48, 1, True), (40, 1, False)])
def test_which_shapes_the_kernels_take(k: int, groups: int, takes: bool):
    assert kernels.supported(k, groups) == takes


def test_other_shapes_are_refused_before_anything_runs():
    x, codes = torch.zeros(1, 256), torch.zeros(4, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="256 values times 128 bytes of codes with 4 scales"):
        kernels.weight_only_matmul(x, codes, 2, torch.ones(4, 4), None)
    with pytest.raises(ValueError, match="64 bytes"):
        kernels.weight_only_matmul(x, codes[:, :64], 2, torch.ones(4, 1), None)
    with pytest.raises(ValueError, match="at most 16384"):
        kernels.quantize_rows(torch.zeros(1, 20000), 3, -6, 448.0)


def compiled(kernel, types: dict[str, str], constants: dict, capability: int, **options: int):
    """For a GPU that need not be there. Addresses and n count as multiples of 16, as they nearly always are."""
    names = kernel.arg_names
    given = {(names.index(name),): value for name, value in constants.items()}
    even = {
        (names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "i32" or name == "n"
    }
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, given, even)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options)


def spilled(made, folder: Path) -> set[str]:
    """Bytes of stack and of local memory, where the registers go that do not suffice."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(?:STACK|LOCAL):\d+", usage))


NOTHING = {"STACK:0", "LOCAL:0"}
IN_REGISTERS = r"\{[^{}]*\}, *\{[^{}]*\}, *%"  # the sum, the first operand, and the address of the second
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n128k"


@pytest.mark.parametrize(
    ("capability", "m", "x", "instruction"),
    [
        (90, 4096, "fp8e4nv", WGMMA + r"32\.f32\.e4m3\.e4m3 " + IN_REGISTERS),
        (90, 4096, "bf16", WGMMA + r"16\.f32\.bf16\.bf16 " + IN_REGISTERS),
        (89, 4096, "fp8e4nv", r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32"),
        (80, 1, "fp16", r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"),
        (80, 1, "fp32", r"fma\.rn\.f32"),
    ],
)
def test_products_compile_to_the_tensor_cores_without_spills(
    capability: int, m: int, x: str, instruction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = kernels.tile(m, torch.float32 if x == "fp32" else torch.float16)
    out = "bf16" if x == "fp8e4nv" else x
    types = {
        "x": f"*{x}",
        "codes": "*u8",
        "scale": "*fp32",
        "bias": f"*{out}",
        "out": f"*{out}",
        "m": "i32",
        "n": "i32",
    }
    constants = {"K": 1152, "GROUP": 128, "SHIFT": 2, "TOKENS": tile.tokens, "ROWS": tile.rows, "STEP": kernels.STEP}
    if x == "fp8e4nv":
        types["x_scale"] = "*fp32"
    else:
        constants["x_scale"] = None
    made = compiled(programs.product, types, constants, capability, num_warps=tile.warps, num_stages=tile.stages)
    assert re.search(instruction, made.asm["ptx"])
    assert spilled(made, tmp_path) == NOTHING


def test_tokens_are_quantized_with_divisions_as_ieee_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"K": 4608, "BLOCK": 8192, "MANTISSA": 3, "FLOOR": 2.0**-6, "LARGEST": 448.0}
    types = {"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}
    made = compiled(programs.quantized_row, types, constants, 90, num_warps=16)
    assert set(re.findall(r"div\.[\w.]+", made.asm["ptx"])) == {"div.rn.f32"}
    assert "cvt.rn.satfinite.e4m3x2.f32" in made.asm["ptx"]
    assert spilled(made, tmp_path) == NOTHING
