"""The integer kernels compute random cases exactly, and touch no memory but their own.

`fuzz_integer.c` draws formats, shapes, groups, scales and values, computes each product in plain C
with 64-bit integers, and compares it to the bit with what every kernel computes. It is compiled
here with the kernels. With DRILLS=long in the environment, 10,000 cases are run.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = ROOT / "fp4dit" / "packed" / "nn"
CASES = 10_000 if os.environ.get("DRILLS") == "long" else 300
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def compile_fuzz(cc: str, folder: Path, *options: str, sources: Path = SOURCES) -> Path:
    """Compile the cases with the kernels of a folder. They may not fuse products and sums."""
    program = folder / "fuzz"
    driver = Path(__file__).with_name("fuzz_integer.c")
    rounding = ["-ffp-contract=off", "-fopenmp-simd"]
    command = [cc, "-g", "-O1", "-w", *rounding, *options, "-I", sources, driver, "-o", program]
    subprocess.run([*command, "-lm", "-lpthread"], check=True)
    return program


def run_fuzz(*command: str | Path, cases: int = CASES) -> dict[str, int]:
    """Run the cases, and return how many products each kernel computed."""
    done = subprocess.run([*command, "0", str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    return {name: int(count) for name, count in counts.items()}


def require_program(name: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def require_sanitizers(cc: str, folder: Path) -> None:
    """Skip the test if a program with sanitizers cannot be compiled and run."""
    program = folder / "empty"
    command = [cc, *SANITIZERS, "-x", "c", "-", "-o", program]
    done = subprocess.run(command, input="int main(void) { return 0; }", text=True)
    if done.returncode or subprocess.run([program]).returncode:
        pytest.skip(f"{cc} has no runtime for {SANITIZERS[0]}")


def test_all_kernels_of_this_machine(tmp_path: Path):
    cc = require_program("cc")
    require_sanitizers(cc, tmp_path)
    counts = run_fuzz(compile_fuzz(cc, tmp_path, *SANITIZERS))
    assert all(count > CASES // 2 for count in counts.values())


def test_the_kernel_of_arm(tmp_path: Path):
    cc, qemu = require_program("aarch64-linux-gnu-gcc"), require_program("qemu-aarch64")
    program = compile_fuzz(cc, tmp_path, "-static")
    counts = run_fuzz(qemu, "-cpu", "max", program)
    assert counts["dotprod"] > CASES // 2


def test_the_kernel_for_avx_vnni(tmp_path: Path):
    """Run this kernel with the instruction that AVX-512 has for the same vectors.

    qemu does not emulate AVX-VNNI, and few machines have it. What is not tested here is the
    encoding of the instruction, and how the processor is asked whether it has it.
    """
    cc = require_program("cc")
    text = (SOURCES / "integer_kernels.c").read_text()
    for old, new in [
        ("{vex%}", "{evex%}"),
        ("(eax >> 4 & 1)", '__builtin_cpu_supports("avx512vnni")'),
    ]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "integer_kernels.c").write_text(text)
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, tmp_path)
    counts = run_fuzz(compile_fuzz(cc, tmp_path, sources=tmp_path))
    if "avxvnni" not in counts:
        pytest.skip("this processor has no AVX-512 VNNI")
    assert counts["avxvnni"] > CASES // 2
