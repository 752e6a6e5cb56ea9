"""Hadamard rotations against the definition, in integers, and against scipy where it knows one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from fp4dit.transforms.hadamard import (
    Hadamard,
    RegularHadamard,
    hadamard_factors,
    hadamard_matrix,
    has_hadamard_matrix,
    random_signs,
    regular_factors,
    regular_matrix,
    rotate_blocks,
)

SIZES = [1, 2, 12, 20, 28, 32, 36, 40, 44, 72, 128, 144, 256, 400, 432, 1024, 1152, 2240]

COMFY_KITCHEN_CODES = """
    -7 -3 1 5 -5 -1 2 6 3 -7 -3 1 4 -5 -2 2 6 3 -7 4 0 -3
    1 -2 2 -1 3 0 -4 7 -3 -6 -2 2 5 -4 -1 3 7 -3 -6 -2 1 5
    -5 -1 3 7 4 -6 -3 1 5 -5 -1 3 0 3 -7 -3 1 5 -5 -1
"""


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_orthogonal_in_integers(n: int):
    h = hadamard_matrix(n).numpy()
    assert h.shape == (n, n)
    assert np.array_equal(np.abs(h), np.ones_like(h))
    exact = h.astype(np.float32)  # sums of ones
    assert np.array_equal(exact @ exact.T, n * np.eye(n))


@pytest.mark.parametrize("n", [*SIZES, 1408, 1536, 2304, 3072, 4608])
def test_rows_are_orthogonal_on_random_integers(n: int):
    """Freivalds' check of H (H^T v) = n v, which others pass with a probability of 2^-80."""
    h = hadamard_matrix(n).numpy()
    assert np.array_equal(np.abs(h), np.ones_like(h))
    exact = h.astype(np.float64)  # whole numbers below 2^53 throughout
    v = np.random.default_rng(n).integers(0, 2**20, (n, 4)).astype(np.float64)
    assert np.array_equal(exact @ (exact.T @ v), n * v)


@pytest.mark.parametrize("n", [2**j for j in range(11)])
def test_powers_of_two_are_sylvesters(n: int):
    assert np.array_equal(hadamard_matrix(n).numpy(), hadamard(n))


def test_known_orders():
    """An order is 1, 2 or a multiple of 4.

    Of these the first five odd parts are known here, 13 (52) is not. The product of two known
    orders is known too.
    """
    known = [n for n in range(-4, 200) if has_hadamard_matrix(n)]
    assert known == [1, 2] + [n for n in range(4, 200, 4) if n // (n & -n) <= 11]
    assert not has_hadamard_matrix(52)
    assert has_hadamard_matrix(2240)  # 28 * 80, the width of Sana
    assert not has_hadamard_matrix(140)  # 35 * 4
    with pytest.raises(
        ValueError, match=r"order 52 is known here: give 2\^j times any product of 12, 20"
    ):
        hadamard_factors(52)


@pytest.mark.parametrize(
    ("k", "size"), [(1152, 1152), (1152, 128), (768, 256), (256, 256), (80, 40), (12, 2), (8, 1)]
)
def test_rotation_is_the_product_with_the_matrix(k: int, size: int):
    x = torch.randn(2, 3, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = torch.block_diag(*[hadamard_matrix(size).double() / size**0.5] * (k // size))
    torch.testing.assert_close(
        rotate_blocks(x, *hadamard_factors(size)), x @ blocks, rtol=1e-12, atol=1e-12
    )
    rotation = Hadamard(None if size == k else size, seed=3)(1, k)
    torch.testing.assert_close(
        rotation.transform_input(x), (x * rotation.signs) @ blocks, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(
        Hadamard(size, signs=False)(1, k).transform_input(x),
        rotate_blocks(x, *hadamard_factors(size)),
    )


@settings(max_examples=15)
@given(
    size=st.sampled_from([2, 12, 20, 32, 256, 288]),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_lengths_and_angles_stay(size: int, blocks: int, seed: int):
    rotation = Hadamard(size, seed)(1, size * blocks)
    x = torch.randn(5, size * blocks, dtype=torch.float64)
    y = rotation.transform_input(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, rotation.transform_weight(x))


def test_an_outlier_is_spread_evenly():
    x = torch.zeros(1, 1152)
    x[0, 77] = 6.0
    y = Hadamard()(1, 1152).transform_input(x)
    torch.testing.assert_close(y.abs(), torch.full_like(y, 6 / 1152**0.5))


def test_signs_come_from_the_seed_and_the_width_alone():
    torch.manual_seed(1)
    one = Hadamard(seed=7)(4, 1152)
    torch.manual_seed(2)
    assert torch.equal(one.signs, Hadamard(128, seed=7)(9, 1152).signs)
    for other in (random_signs(8, 1152), random_signs(7, 1154)[:1152]):
        assert not torch.equal(one.signs, other)
    assert set(one.signs.tolist()) == {-1, 1}
    assert abs(one.signs.float().mean().item()) < 4 / 1152**0.5


def test_signs_stay_what_saved_models_were_rotated_with():
    """Only the seed is saved, so other numbers would break every rotated checkpoint."""
    assert random_signs(0, 12).tolist() == [1, 1, -1, 1, 1, -1, 1, 1, -1, -1, -1, 1]


def test_nothing_is_saved_and_nothing_is_lost():
    with torch.device("meta"):
        rotation = Hadamard(seed=5)(4, 288)
    assert not rotation.state_dict()
    assert rotation.storage_bits() == 0
    x = torch.randn(3, 288)
    assert torch.equal(
        rotation.half().transform_input(x), Hadamard(seed=5)(4, 288).transform_input(x)
    )


@pytest.mark.parametrize(
    ("size", "k", "message"),
    [
        (
            None,
            2080,
            r"size 2080 fits rows of 2080 values: use one of 2, 4, 8, 16, 20, 32, 40, 80, 160",
        ),
        (
            64,
            1440,
            r"size 64 fits rows of 1440 values: use one of 2, 4, 8, 12, 16, 20, 24, 32, 36, 40",
        ),
        (52, 1040, "size 52 fits rows of 1040"),
        (0, 64, "size 0 fits rows of 64"),
        (-32, 64, "size -32 fits rows of 64"),
        (None, 77, "size 77 fits rows of 77 values: leave it out"),
    ],
)
def test_a_size_that_does_not_fit_says_which_would(size: int | None, k: int, message: str):
    with pytest.raises(ValueError, match=message):
        Hadamard(size)(8, k)


@pytest.mark.parametrize("n", [4, 16, 64, 256, 1024])
def test_regular_matrices_are_orthogonal_and_have_equal_sums(n: int):
    h = regular_matrix(n).numpy().astype(np.float64)
    assert np.array_equal(np.abs(h), np.ones_like(h))
    assert np.array_equal(h @ h.T, n * np.eye(n))
    assert np.array_equal(h.sum(0), np.full(n, n**0.5))
    assert np.array_equal(h.sum(1), np.full(n, n**0.5))
    assert torch.kron(*regular_factors(n)).equal(regular_matrix(n))


def test_equal_channels_stay_where_sylvesters_matrix_gathers_them():
    """The largest value of a constant row is 1 instead of sqrt(n), and an outlier is spread."""
    regular, sylvester = RegularHadamard(256)(1, 512), Hadamard(256, signs=False)(1, 512)
    ones, outlier = torch.ones(1, 512), torch.zeros(1, 512)
    outlier[0, 77] = 16.0
    assert torch.equal(regular.transform_input(ones), ones)
    assert sylvester.transform_input(ones).max() == 16
    assert torch.equal(regular.transform_input(outlier)[:, :256].abs(), ones[:, :256])


def test_regular_rotation_gives_the_codes_of_comfy_kitchen():
    """They come from `quantize_convrot_w4a4_weight(weight, 16)` of comfy-kitchen 0.2.40."""
    weight = ((torch.arange(64) * 37) % 29 - 14).view(1, 64).float() / 8
    rotated = RegularHadamard(16)(1, 64).transform_weight(weight)
    codes = (rotated / rotated.abs().max() * 7).round().int().flatten().tolist()
    assert codes == [int(code) for code in COMFY_KITCHEN_CODES.split()]


@pytest.mark.parametrize(("k", "block"), [(768, 256), (1152, 64), (4608, 256), (36, 4)])
def test_a_width_has_blocks_of_the_largest_power_of_four(k: int, block: int):
    rotation = RegularHadamard()(1, k)
    assert len(rotation.left) * len(rotation.right) == block


@pytest.mark.parametrize(("size", "k"), [(256, 77), (32, 64), (1, 64), (0, 64), (-4, 64)])
def test_a_regular_size_that_does_not_fit_is_refused(size: int, k: int):
    with pytest.raises(ValueError, match=rf"size {size} fits rows of {k} values: the size is 4"):
        RegularHadamard(size)(8, k)
