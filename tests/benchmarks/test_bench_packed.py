"""The benchmark of packed weights, on a CPU and with tiny models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import cpu, products, published, steps
from benchmarks.bench_packed import Scale, main
from benchmarks.products import Sizes
from benchmarks.profiles import classify_kernel
from benchmarks.timing import time_in_turn
from fp4dit.packed.nn.backends import DequantizeBackend

pytestmark = pytest.mark.unchecked

CPU = torch.device("cpu")
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "caption_channels": 128,
}
SIZES = Sizes([(24, 128)], (3,), (torch.bfloat16,), repeats=1, calls=2)
SCALE = Scale(
    SIZES,
    SIZES,
    steps.Scale(batches=(1,), tokens=7, sampler=1, repeats=1, images=1, compile_=lambda dit: None),
    cpu.Scale(prompts=1, sampler=1, repeats=1, layers=1),
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output of a run that also takes the CPU for a GPU."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        for model in ("pixart_sigma", "pixart_sigma_512"):
            kind, config = published.PUBLISHED[model]
            patch.setitem(
                published.PUBLISHED,
                model,
                (kind, config | TINY | {"sample_size": 8, "num_layers": 1}),
            )
        patch.setattr(products, "COLD_BYTES", 10_000)
        main(SCALE, CPU, folder, run=lambda part, *arguments: part(*arguments))
        yield folder


def table(text: str, head: str) -> dict[str, list[str]]:
    """Return the rows of a table by their first cell. `head` is the title of its first column."""
    _, rest = text.split(f"| {head} | ")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return {
        cells[0]: cells[1:]
        for line in lines
        if (cells := line.removeprefix("| ").removesuffix(" |").split(" | "))
    }


def test_tables_of_a_gpu(out: Path):
    text = (out / "packed.md").read_text()
    step = table(text, "batch 1 with guidance, 32 rows")
    assert list(step) == [
        "bf16",
        "bf16 compiled",
        "torchao float8 compiled",
        "W4A8",
        "W4A6",
        "W4A16",
        "W4A8 compiled",
        "W4A6 compiled",
        "W4A6 expanded once, compiled",
    ]
    assert step.pop("W4A6 expanded once, compiled")[0] == "INT8 of cuBLAS"
    assert set(step.pop("torchao float8 compiled")[1:]) == {"not measured"}
    step = {name: cells[1:] for name, cells in step.items()}  # without the kind of products
    for ms, speed, of_torchao, image, _, _ in step.values():
        assert float(speed) == pytest.approx(
            float(step["bf16 compiled"][0]) / float(ms), rel=0.1, abs=0.01
        )
        assert float(image) >= 0  # of hundredths of a second
        assert of_torchao == "not measured"
    assert step["bf16"][5] == step["bf16 compiled"][5] == "0.0000"
    assert 0.01 < float(step["W4A8"][5]) < 0.5
    assert step["W4A8"][5] == step["W4A8 compiled"][5]
    shares = table(text, "of a step, batch 1")
    assert sum(int(cell.rstrip("%")) for cell in shares["W4A8"]) == pytest.approx(100, abs=3)


def test_tables_of_a_cpu(out: Path):
    text = (out / "packed.md").read_text()
    read = table(text, "pixart_sigma")
    transformer = published.build_random_transformer("pixart_sigma")
    parameters = sum(p.numel() for p in transformer.parameters())
    assert float(read["bf16"][0]) == pytest.approx(2 * parameters / 1e6, abs=0.06)
    assert 4.125 / 16 < float(read["W4A8"][1]) < 0.29
    drawn = table(text, "1 images in 1 steps")
    assert list(drawn) == list(cpu.SIDES[:-1])  # SDNQ is installed by hand
    whole = drawn["full precision"]
    assert float(whole[2]) == 1.0  # its speed is what the others' are compared with
    for side in cpu.PACKED_DRAWING:
        assert float(drawn[side][4]) < (0.27 if side == "W8A8" else 0.16) * float(whole[4])


def test_tables_without_a_gpu(out: Path):
    text = "\n".join(steps.format_step_tables(out, steps.Scale(), None))
    cells_by_row = table(text, "of a step, batch 1") | table(text, "batch 1 with guidance, 32 rows")
    products = {variant.product for variant in steps.VARIANTS.values()}
    cells = {cell for row in cells_by_row.values() for cell in row}
    assert cells == {"not measured"} | products


def test_a_wrong_product_has_a_large_error(monkeypatch: pytest.MonkeyPatch):
    class Short(DequantizeBackend):
        def __call__(self, layer, x):
            return 0.9 * super().__call__(layer, x)

    monkeypatch.setattr(products, "BACKENDS", (Short(), DequantizeBackend()))
    Short.name = "short"
    monkeypatch.setattr(products, "TOKEN_FORMATS", products.TOKEN_FORMATS[:1])
    error = {product.backend: product.error for product in products.measure_products(SIZES, CPU)}
    assert error["short"] == pytest.approx(0.1, rel=0.05)
    assert error["plain"] < error["dequantize"] < 0.005


def test_calls_take_turns():
    seen: list[str] = []
    times = time_in_turn(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, CPU, count=2
    )
    assert "".join(seen) == "aabb" * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (
            "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<96>>",
            "attention",
        ),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "products"),
        ("packed_matmul_kernel", "products"),
        ("triton_tem_fused_addmm_gelu_3", "products"),
        ("triton_red_fused__scaled_mm_abs_amax_clamp_div_1", "quantization"),
        ("quantize_row_kernel", "quantization"),
        ("triton_red_fused_add_addmm_mul_native_layer_norm_0", "norms"),
        (
            "void at::native::(anonymous namespace)::"
            "vectorized_layer_norm_kernel<c10::BFloat16, float>",
            "norms",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
            "all else",
        ),
    ],
)
def test_classify_kernel(kernel: str, expected: str):
    assert classify_kernel(kernel) == expected
