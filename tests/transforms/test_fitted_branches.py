"""Branches that are refined, quantized or principal, against plain loops and numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp4dit.numerics.formats import fp16, integer
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn.linear import make_empty_layer, pack_layer
from fp4dit.quantization.format_forecast import apply_known_transforms
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import factor_low_rank
from fp4dit.transforms.principal_components import PrincipalBranch, PrincipalComponents
from fp4dit.transforms.refined_low_rank import (
    QuantizedLowRank,
    RefinedLowRank,
    decode_integers,
    encode_integers,
    fit_quantized_factors,
)

INT4 = Quantizer(integer(4), PerGroup(16), AbsMax(fp16))
OUT, K = 40, 64


def draw_weight(seed: int = 0) -> Tensor:
    """Return a weight whose singular values fall."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0, -3, OUT).exp()
    return (torch.randn(OUT, OUT, generator=draw) * sizes) @ torch.randn(OUT, K, generator=draw)


def draw_inputs(seed: int = 1) -> Tensor:
    """Return inputs with a few large directions, which are not channels."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.full((K,), 0.1).index_fill_(0, torch.arange(4), 5.0)
    basis = torch.linalg.qr(torch.randn(K, K, generator=draw)).Q
    return (torch.randn(3, 50, K, generator=draw) * sizes) @ basis


def refine_plainly(weight: Tensor, rank: int, iterations: int) -> list[float]:
    """Return the error of the weight after each of R = Q(W - L), L = svd_r(W - R), by numpy."""
    rest, errors = np.zeros(weight.shape), []
    for _ in range(iterations):
        u, s, v = np.linalg.svd(weight.double().numpy() - rest)
        branch = (u[:, :rank] * s[:rank]) @ v[:rank]
        rest = INT4(torch.from_numpy(weight.double().numpy() - branch).float()).double().numpy()
        errors.append(np.square(weight.double().numpy() - branch - rest).sum().item())
    return errors


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_refinement_is_the_plain_loop(iterations: int):
    weight = draw_weight()
    errors = refine_plainly(weight, 4, iterations)
    assert errors == sorted(errors, reverse=True)
    branch = RefinedLowRank(4, iterations)(OUT, K)
    branch.fit_weight(weight, INT4)
    rest = branch.transform_weight(weight)
    error = (rest - INT4(rest)).square().sum().item()
    assert error == pytest.approx(errors[-1], rel=0.02)  # its factors are fp16


def test_refinement_keeps_the_best_branch():
    weight = draw_weight(seed=3)
    errors = []
    for iterations in (1, 2, 4, 8, 16, 32):
        branch = RefinedLowRank(2, iterations)(OUT, K)
        branch.fit_weight(weight, INT4)
        rest = branch.transform_weight(weight)
        errors.append((rest - INT4(rest)).square().sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
def test_integers_are_those_of_the_quantizer(bits: int):
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(bits))
    codes, scale = encode_integers(x, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (7, -(-13 * bits // 8))
    largest = 2 ** (bits - 1) - 1
    step = (x.abs().amax(1, keepdim=True) / largest).half().float()
    expected = (x / step).round().clamp(-largest, largest) * step
    assert torch.equal(decode_integers(codes, scale, bits, 13), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_factors_make_up_for_each_other(bits: int):
    """They are better than the rounded factors of the SVD with the same scales."""
    target, rows = draw_weight(), Quantizer(integer(bits), PerGroup(4), AbsMax(fp16))
    up, down = fit_quantized_factors(target, 4, rows)
    assert torch.equal(rows(up), up)
    error = (target - up @ down).norm()
    svd_up, svd_down = factor_low_rank(target, 4)
    size = (svd_down.norm(dim=1) / svd_up.norm(dim=0)).sqrt()
    rounded = rows((svd_up * size).float()) @ rows((svd_down / size[:, None]).float())
    nearest = target - (svd_up @ svd_down).float()
    assert nearest.norm() < error < (target - rounded).norm()


def test_bits_of_quantized_factors():
    """Codes are padded to bytes by row, and each row has a scale of 16 bits."""
    for bits, codes in ((8, 8 * 4 * (OUT + K)), (4, 4 * 4 * (OUT + K)), (5, 5 * 4 * K + 24 * OUT)):
        assert QuantizedLowRank(4, bits=bits)(OUT, K).storage_bits() == codes + 16 * (4 + OUT)


def test_inputs_of_the_quantized_branch_are_quantized_by_token():
    weight, x = draw_weight(), draw_inputs()
    branch = QuantizedLowRank(4, input_bits=8)(OUT, K)
    branch.fit_weight(weight, INT4)

    def quantize(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    up, down = branch.factors
    expected = quantize(quantize(x) @ down.mT) @ up.mT
    torch.testing.assert_close(branch.compute_bypass(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantizedLowRank(bits=9), "integers of 2 to 8 bits, not bits=9"),
        (QuantizedLowRank(input_bits=1), "not bits=8 and input_bits=1"),
        (QuantizedLowRank(rank=0), "rank 0 after 6 iterations keeps nothing"),
        (RefinedLowRank(iterations=0), "after 0 iterations keeps nothing"),
        (PrincipalComponents(0.0), "0.0 of 64 components is 0 of them"),
        (PrincipalComponents(1.0), "1.0 of 64 components is 64 of them"),
    ],
)
def test_what_makes_no_branch_is_refused(spec: TransformSpec, message: str):
    with pytest.raises(ValueError, match=message):
        spec(OUT, K)


def fit_principal(weight: Tensor, x: Tensor) -> PrincipalBranch:
    branch = PrincipalComponents(4 / K)(OUT, K)
    branch.fit(weight, x, INT4, INT4)
    return branch


def test_principal_components_are_the_largest_eigenvectors():
    weight, x = draw_weight(), draw_inputs()
    branch = fit_principal(weight, x)
    tokens = x.flatten(0, 1).double().numpy()
    _, vectors = np.linalg.eigh(tokens.T @ tokens)
    top = torch.from_numpy(vectors[:, -4:])
    down = branch.down.double()
    torch.testing.assert_close(down.mT @ down, top @ top.mT, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        branch.up.double() @ down, weight.double() @ top @ top.mT, rtol=0, atol=2e-2
    )
    assert branch.storage_bits() == 16 * 4 * (OUT + K)


def test_what_is_left_is_small_and_the_sum_stays():
    weight, x = draw_weight(), draw_inputs()
    branch = fit_principal(weight, x)
    rest = branch.transform_input(x)
    assert rest.norm() < 0.1 * x.norm()
    branch_output = branch.compute_bypass(x)
    total = rest @ branch.transform_weight(weight).mT + branch_output
    expected = x @ weight.mT
    assert (total - expected).norm() < 2**-11 * expected.norm()  # `up` is rounded to fp16


def test_large_directions_are_kept_from_four_bits():
    """A layer with INT4 weights and inputs errs far less than with a rotation alone."""
    x, errors = draw_inputs(), {}
    for name, chain in (
        ("rotation", [Hadamard()]),
        ("principal", [PrincipalComponents(4 / K), Hadamard()]),
    ):
        source = nn.Linear(K, OUT, bias=False)
        source.weight.data = draw_weight()
        expected = source(x)
        layer = QuantLayer(source, INT4, chain)
        layer.input_fake_quant = nn.Module()
        layer.input_fake_quant.forward = INT4
        layer.prepare(x).commit_weight()
        errors[name] = (layer(x) - expected).norm().item()
    assert errors["principal"] < 0.2 * errors["rotation"]


@pytest.mark.parametrize(
    "spec", [RefinedLowRank(3), QuantizedLowRank(3, bits=4), PrincipalComponents()], ids=str
)
def test_a_packed_layer_holds_the_branch(spec: TransformSpec):
    source, x = nn.Linear(K, OUT), draw_inputs()
    layer = QuantLayer(source, INT4, [spec])
    layer.prepare(x).commit_weight()
    packed = pack_layer(layer)
    loaded = make_empty_layer(source, packed.layout, [spec(OUT, K)], "cpu")
    loaded.load_state_dict(packed.state_dict())
    assert torch.equal(loaded(x), layer(x))
    stored = sum(v.nbytes for k, v in packed.state_dict().items() if k.startswith("transforms."))
    assert spec(OUT, K).storage_bits() == 8 * stored


def test_a_forecast_reads_rows_of_a_weight_that_is_not_fitted():
    rows = torch.randn(3, K)
    for spec in (RefinedLowRank(), QuantizedLowRank()):
        rule = Rule("*", INT4, [spec])
        assert torch.equal(apply_known_transforms(rule, rows, torch.Size([OUT, K])), rows)
