"""Low-bit training against autograd, closed forms and the errors of Quartet's paper."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fp4dit.lowbit_training.linear import (
    LowBitLinear,
    TrainRule,
    make_low_bit,
    replace_linear_layers_,
    resume_rng_,
)
from fp4dit.lowbit_training.matmul import MatmulRecipe
from fp4dit.lowbit_training.operand_quant import (
    OperandQuantizer,
    QuantizedOperand,
    absmax_quantizer,
    mxfp8_quantizer,
    nvfp4_quantizer,
    quest_quantizer,
    rotate_operand,
)
from fp4dit.lowbit_training.rng import BackwardRng
from fp4dit.numerics.block_scales import floor_ratio_exponent
from fp4dit.numerics.scale_rules import StandardDeviations
from fp4dit.utils.errors import UserError

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of E2M1
SIZES = [(64, 32, 96), (17, 48, 33), (5, 7, 3), (1, 1, 1)]  # tokens, in, out


@dataclass(frozen=True)
class Same:
    """Leaves operands as they are."""

    stochastic: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> QuantizedOperand:
        return QuantizedOperand(x, 1.0)


CODED = quest_quantizer(floor_ratio_exponent, StandardDeviations())  # as Quartet's code has it
FORWARD = {
    "quest": quest_quantizer(),
    "coded": CODED,
    "absmax": absmax_quantizer(),
    "nvfp4": nvfp4_quantizer(),
}
BACKWARD = {
    "plain": None,
    "mxfp8": mxfp8_quantizer(),
    "mxfp4": absmax_quantizer(),
    "aligned": absmax_quantizer(1.009276),
    "stochastic": absmax_quantizer(stochastic=True),
}


def random_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def layer(
    k: int, o: int, recipe: MatmulRecipe = MatmulRecipe(), dtype: torch.dtype = torch.float32
) -> LowBitLinear:
    linear = LowBitLinear(k, o, recipe=recipe, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(random_normal(o, k, seed=1) / k**0.5)
        linear.bias.copy_(random_normal(o, seed=2))
    return linear


def compute_gradients(module: nn.Linear, x: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """The output, and the derivatives of its product with `slope`."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(slope)
    return {"y": y.detach(), "x": x.grad} | {
        name: p.grad.clone() for name, p in module.named_parameters()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def dequantize_operand(
    projection: OperandQuantizer, x: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    operand = projection(x, generator)
    return operand.values * operand.alpha


@pytest.mark.parametrize("backward", [None, Same()], ids=["plain", "same"])
@pytest.mark.parametrize(("tokens", "k", "o"), SIZES)
def test_without_rounding_gradients_equal_autograd(
    tokens: int, k: int, o: int, backward: OperandQuantizer | None
):
    """Rotations, signs and zeros cancel, for sizes that are no multiple of 32 too."""
    low_bit = layer(k, o, MatmulRecipe(Same(), backward), torch.float64)
    x, slope = (
        random_normal(2, tokens, k, seed=3, dtype=torch.float64),
        random_normal(2, tokens, o, seed=4, dtype=torch.float64),
    )
    plain = nn.Linear(k, o, dtype=torch.float64)
    plain.load_state_dict(low_bit.state_dict())
    expected = compute_gradients(plain, x, slope)
    for name, gradient in compute_gradients(low_bit, x, slope).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def gaussian_error(projection: OperandQuantizer, sigma: float = 1.0) -> float:
    x = sigma * random_normal(2**15, 32, seed=5)
    return (
        ((dequantize_operand(projection, x, torch.Generator().manual_seed(6)) - x) / sigma)
        .square()
        .mean()
        .item()
    )


@pytest.mark.parametrize(
    ("projection", "error"),
    [
        (absmax_quantizer(), 0.0137),
        (absmax_quantizer(stochastic=True), 0.028),
        (quest_quantizer(), 0.013),
        (CODED, 0.027),
    ],
    ids=["nearest", "stochastic", "quest", "coded"],
)
def test_errors_for_gaussian_values_equal_the_paper(projection: OperandQuantizer, error: float):
    """Table 2 of arXiv:2505.14669. Its 0.0132 for QuEST lies between two of ours."""
    assert gaussian_error(projection) == pytest.approx(error, rel=0.03)


def test_quests_error_over_all_scales():
    over = [gaussian_error(quest_quantizer(), 2 ** (i / 4)) for i in range(4)]
    assert 0.97 * 0.0127 < sum(over) / 4 < 1.03 * 0.0134


@pytest.mark.parametrize("channel", [0, 1, 31])
def test_quest_keeps_outliers_of_any_channel(channel: int):
    """Standard deviations do not see a block's mean, and lose 0.66 in place of 0.12."""
    x = random_normal(1000, 64, seed=33)
    x[:, channel] += 50
    rotated = rotate_operand(x)
    assert relative_error(dequantize_operand(quest_quantizer(), rotated), rotated) < 0.13
    assert relative_error(
        dequantize_operand(quest_quantizer(reach=StandardDeviations()), rotated), rotated
    ) > (0.6 if channel == 0 else 0)


def test_alignment_corrects_shrunk_gaussian_values():
    x = random_normal(2**15, 32, seed=7)
    length = lambda projection: (
        (dequantize_operand(projection, x) * x).mean() / x.square().mean()
    ).item()
    assert length(absmax_quantizer()) == pytest.approx(1 - 0.0093, abs=1e-3)
    assert length(absmax_quantizer(1.009276)) == pytest.approx(1, abs=1e-3)


def test_absmax_clips_nothing_and_errs_by_half_a_step():
    x = random_normal(500, 32, seed=8) * torch.logspace(-20, 20, 500)[:, None]
    operand = absmax_quantizer()(x)
    scale = 2.0 ** (x.abs().amax(1, keepdim=True).log2().floor() - 2)
    levels = torch.cat([-LEVELS.flip(0), LEVELS]) * scale[..., None]
    nearest = (levels - 0.75 * x[..., None]).abs().argmin(-1, keepdim=True)
    torch.testing.assert_close(
        operand.values, levels.expand(500, 32, -1).gather(-1, nearest)[..., 0]
    )
    assert operand.alpha == pytest.approx(4 / 3)
    assert (
        (operand.values * operand.alpha - x).abs() <= 4 / 3 * scale * 1.001
    ).all()  # the longest step is 2


def test_stochastic_rounding_is_unbiased():
    """The standard deviation of a mean of n draws of step s is at most s / 2 / sqrt(n)."""
    x, n = random_normal(40, 32, seed=9) * torch.logspace(-6, 6, 40)[:, None], 400
    generator = torch.Generator().manual_seed(10)
    mean = (
        sum(dequantize_operand(absmax_quantizer(stochastic=True), x, generator) for _ in range(n))
        / n
    )
    scale = 4 / 3 * 2.0 ** (x.abs().amax(1, keepdim=True).log2().floor() - 2)
    deviation = (mean - x) / (2 * scale / 2 / n**0.5)  # no step is longer than 2
    assert deviation.abs().max() < 5
    assert deviation.square().mean() < 1.1
    nearest = (dequantize_operand(absmax_quantizer(), x) - x) / (2 * scale / 2 / n**0.5)
    assert nearest.square().mean() > 10  # and the bound tells them apart


@pytest.mark.parametrize("exponent", ["nearest", "below"])
def test_masks_are_false_exactly_for_saturated_values(exponent: str):
    x = random_normal(300, 32, seed=11)
    if exponent == "below":
        operand = CODED(x)
        scale = 2.0 ** (2.92247856 * x.std(1, correction=0, keepdim=True) / 6).log2().floor()
    else:
        operand = quest_quantizer()(x)
        scale = 2.0 ** (2.92247856 * x.square().mean(1, keepdim=True).sqrt() / 6).log2().round()
    assert torch.equal(operand.unclipped, x.abs() < 6 * scale)
    assert 0 < (~operand.unclipped).float().mean() < 0.1
    assert torch.equal(
        operand.values[~operand.unclipped], (6 * scale * x.sign())[~operand.unclipped]
    )


def test_the_gradient_of_clipped_values_is_zero():
    """The gradients of the rotated operands are those of a plain product, times the mask."""
    low_bit = layer(64, 96, MatmulRecipe(CODED, None))
    x, slope = random_normal(128, 64, seed=12), random_normal(128, 96, seed=13)
    actual = compute_gradients(low_bit, x, slope)
    a, b = (CODED(rotate_operand(side)) for side in (x, low_bit.weight.detach()))
    assert not a.unclipped.all()
    assert not b.unclipped.all()
    torch.testing.assert_close(
        rotate_operand(actual["x"]), (slope @ b.values) * a.unclipped, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        rotate_operand(actual["weight"]), (slope.T @ a.values) * b.unclipped, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(actual["bias"], slope.sum(0))


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("backward", BACKWARD)
def test_every_recipe_comes_near_the_plain_layer(forward: str, backward: str):
    low_bit = layer(128, 96, MatmulRecipe(FORWARD[forward], BACKWARD[backward]))
    x, slope = random_normal(256, 128, seed=14), random_normal(256, 96, seed=15)
    plain = nn.Linear(128, 96)
    plain.load_state_dict(low_bit.state_dict())
    expected, actual = compute_gradients(plain, x, slope), compute_gradients(low_bit, x, slope)
    bound = 0.4 if forward == "coded" or backward == "stochastic" else 0.24
    for name in ("y", "x", "weight"):
        assert 1e-3 < relative_error(actual[name], expected[name]) < bound, name
    assert torch.equal(actual["bias"], expected["bias"])


def test_gradient_errors_follow_operand_errors():
    """Independent errors of two operands add up: sqrt(2 * MSE) of a product of Gaussian ones."""
    x, slope = random_normal(256, 128, seed=16), random_normal(256, 96, seed=17)
    exact = compute_gradients(layer(128, 96, MatmulRecipe(quest_quantizer(), None)), x, slope)
    error = lambda way: relative_error(
        compute_gradients(layer(128, 96, MatmulRecipe(quest_quantizer(), way)), x, slope)["weight"],
        exact["weight"],
    )
    for way in (absmax_quantizer(), absmax_quantizer(stochastic=True), mxfp8_quantizer()):
        assert error(way) == pytest.approx((2 * gaussian_error(way)) ** 0.5, rel=0.05)


def test_backward_passes_have_different_signs():
    low_bit, x, slope = (
        layer(64, 32),
        random_normal(64, 64, seed=18),
        random_normal(64, 32, seed=19),
    )
    exact = compute_gradients(layer(64, 32, MatmulRecipe(quest_quantizer(), None)), x, slope)[
        "weight"
    ]
    passes = [compute_gradients(low_bit, x, slope)["weight"] for _ in range(16)]
    assert not any(torch.equal(one, next_one) for one, next_one in pairwise(passes))
    assert relative_error(torch.stack(passes).mean(0), exact) < 0.6 * relative_error(
        passes[0], exact
    )


@pytest.mark.parametrize(
    "way", [absmax_quantizer(), absmax_quantizer(stochastic=True)], ids=["nearest", "stochastic"]
)
def test_passes_do_not_depend_on_other_random_numbers(way: OperandQuantizer):
    low_bit, x, slope = (
        layer(64, 32, MatmulRecipe(quest_quantizer(), way)),
        random_normal(64, 64, seed=20),
        random_normal(64, 32, seed=21),
    )
    first = [compute_gradients(low_bit, x, slope)["x"] for _ in range(3)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    resume_rng_(low_bit, 1)
    assert torch.equal(compute_gradients(low_bit, x, slope)["x"], first[1])
    assert torch.equal(torch.get_rng_state(), state)
    other = layer(64, 32, MatmulRecipe(quest_quantizer(), way))
    other.backward_rng = BackwardRng(seed=1)
    assert not torch.equal(compute_gradients(other, x, slope)["x"], first[0])


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 8))
    replace_linear_layers_(model, [TrainRule("*")])
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool):
    x = random_normal(50, 40, seed=22).requires_grad_()
    plain_model, checkpointed_model = small_model(), small_model()
    for _ in range(2):
        plain_model(x).square().sum().backward()
        checkpoint(checkpointed_model, x, use_reentrant=reentrant).square().sum().backward()
    for p, q in zip(plain_model.parameters(), checkpointed_model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("forward", FORWARD)
def test_autocast_in_bf16_agrees_with_fp32(forward: str):
    """The operands are exact in bf16; sums and the incoming gradient differ in the last digits."""
    low_bit, x = (
        layer(128, 96, MatmulRecipe(FORWARD[forward], None)),
        random_normal(64, 128, seed=23),
    )
    slope = random_normal(64, 96, seed=24).bfloat16()
    expected = compute_gradients(low_bit, x, slope.float())
    with torch.autocast("cpu", torch.bfloat16):
        actual = compute_gradients(low_bit, x, slope)  # the backward pass too
    assert (actual["y"].dtype, actual["x"].dtype, actual["weight"].dtype) == (
        torch.bfloat16,
        *2 * [torch.float32],
    )
    for name in ("y", "x", "weight"):
        assert relative_error(actual[name].float(), expected[name]) < 2**-8, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype: torch.dtype):
    low_bit = layer(96, 64, dtype=dtype)
    x, slope = (
        random_normal(64, 96, seed=25, dtype=dtype),
        1e-4 * random_normal(64, 64, seed=26, dtype=dtype),
    )
    plain = nn.Linear(96, 64)
    plain.load_state_dict(low_bit.state_dict())
    expected = compute_gradients(plain, x.float(), slope.float())
    for name, gradient in compute_gradients(low_bit, x, slope).items():
        assert gradient.dtype == dtype
        assert relative_error(gradient.float(), expected[name]) < 0.24, name


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("forward", FORWARD)
def test_zeros_stay_zeros(forward: str, backward: str):
    low_bit = layer(70, 40, MatmulRecipe(FORWARD[forward], BACKWARD[backward]))
    zeros = compute_gradients(low_bit, torch.zeros(33, 70), torch.zeros(33, 40))
    torch.testing.assert_close(zeros.pop("y"), low_bit.bias.detach().expand(33, 40))
    assert not any(gradient.any() for gradient in zeros.values())
    x, slope = random_normal(64, 70, seed=27), random_normal(64, 40, seed=28)
    x[:32], slope[32:] = 0, 0
    actual = compute_gradients(low_bit, x, slope)
    assert all(gradient.isfinite().all() for gradient in actual.values())
    assert not actual["x"][32:].any()


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,)])
def test_no_token_and_one_token(shape: tuple[int, ...]):
    actual = compute_gradients(layer(40, 8), torch.ones(shape), torch.ones(*shape[:-1], 8))
    assert actual["y"].shape == (*shape[:-1], 8)
    assert actual["weight"].any() == bool(prod(shape))


def test_nonfinite_values_propagate():
    x = torch.ones(4, 40)
    x[1, 2] = torch.inf
    assert layer(40, 8)(x)[1].isnan().all()


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on():
    low_bit, x = layer(64, 32), random_normal(32, 64, seed=29).requires_grad_()
    low_bit.weight.requires_grad_(False)
    low_bit(x).sum().backward()
    assert low_bit.weight.grad is None
    assert x.grad.any()


def train_in_a_process(rank: int, world: int, folder: str) -> None:
    """Three steps on this process's share of a batch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    model = steps(DistributedDataParallel(small_model()), rank, world)
    if rank == 0:
        Path(folder, "weights").write_bytes(flatten_parameters(model).numpy().tobytes())
    dist.destroy_process_group()


def steps(model: nn.Module, rank: int = 0, world: int = 1) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, targets = random_normal(3, 128, 40, seed=30), random_normal(3, 128, 8, seed=31)
    for inputs, answers in zip(x.chunk(world, 1)[rank], targets.chunk(world, 1)[rank], strict=True):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), answers).backward()
        optimizer.step()
    return model


def flatten_parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_processes_equal_one_with_both_batches(tmp_path: Path):
    """Blocks over tokens do not straddle the processes, whose signs are the same."""
    spawn(train_in_a_process, (2, str(tmp_path)), nprocs=2)
    weights = torch.frombuffer(bytearray((tmp_path / "weights").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(
        weights, flatten_parameters(steps(small_model())), rtol=1e-5, atol=1e-6
    )
    assert (weights - flatten_parameters(small_model())).norm() > 0.01


def train_regression(recipe: MatmulRecipe | None, count: int = 100) -> float:
    """The loss of a small network at the end, learning what another says."""
    torch.manual_seed(0)
    build = lambda: nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32)
    )
    teacher, student = build(), build()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(3)
    replace_linear_layers_(student, [TrainRule("*", recipe)])
    optimizer, losses = torch.optim.Adam(student.parameters(), 3e-3), []
    for i in range(count):
        x = random_normal(256, 64, seed=1000 + i)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return fmean(losses[-20:])


@pytest.mark.unchecked
def test_quartet_trains_better_than_plain_mxfp4():
    untrained, full, quartet = (
        train_regression(MatmulRecipe(), count=1),
        train_regression(None),
        train_regression(MatmulRecipe()),
    )
    assert full < quartet < 0.5 * untrained
    assert quartet < train_regression(
        MatmulRecipe(absmax_quantizer(), absmax_quantizer(stochastic=True))
    )


def test_rules_name_the_layers_and_parameters_stay_the_same():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ModuleDict({"out": nn.Linear(8, 8), "left": nn.Linear(8, 8)})
    )
    before = dict(model.named_parameters())
    layers = replace_linear_layers_(
        model, [TrainRule("*.left", None), TrainRule("*", MatmulRecipe(nvfp4_quantizer()))]
    )
    assert list(layers) == ["0", "1.out"]
    assert all(before[name] is p for name, p in model.named_parameters())
    assert layers["0"].recipe == MatmulRecipe(nvfp4_quantizer())
    assert layers["0"].backward_rng.seed != layers["1.out"].backward_rng.seed
    assert type(model.get_submodule("1.left")) is nn.Linear
    with pytest.raises(UserError, match=r"no layer is left for the rule '\*\.attn'"):
        replace_linear_layers_(model, [TrainRule("*.attn")])
    assert not replace_linear_layers_(model, [TrainRule("*.attn", optional=True)])


def test_the_output_layer_of_attention_is_not_replaced():
    """nn.MultiheadAttention reads its weight and never calls it."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    assert list(replace_linear_layers_(model, [TrainRule("*")])) == ["after"]


def test_state_and_mode_are_those_of_the_plain_layer():
    plain = nn.Linear(8, 4).eval()
    low_bit = make_low_bit(plain, MatmulRecipe())
    assert low_bit.state_dict().keys() == plain.state_dict().keys()
    assert not low_bit.training
    plain.load_state_dict(low_bit.state_dict())


def test_a_stochastic_forward_product_is_refused():
    with pytest.raises(ValueError, match="round it to nearest"):
        MatmulRecipe(absmax_quantizer(stochastic=True))


def test_a_compiled_model_draws_new_signs_too():
    low_bit, x = layer(64, 32), random_normal(64, 64, seed=32)
    run = torch.compile(low_bit, backend="eager")
    gradients_by_pass = []
    for _ in range(2):
        low_bit.zero_grad()
        run(x).square().sum().backward()
        gradients_by_pass.append(low_bit.weight.grad.clone())
    assert not torch.equal(*gradients_by_pass)
