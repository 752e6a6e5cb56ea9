"""Low-bit training against autograd's plain products, closed forms and the errors that Quartet's paper states."""

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

from fp4dit.blockscales import below
from fp4dit.errors import UserError
from fp4dit.scales import Deviations
from fp4dit.training.draws import Draws
from fp4dit.training.layer import Fp4TrainLinear, TrainRule, resume_, train_in_few_bits, train_in_few_bits_
from fp4dit.training.product import Recipe
from fp4dit.training.projections import Projected, Projection, absmax, mxfp8, nvfp4, quest, turned

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of E2M1
SIZES = [(64, 32, 96), (17, 48, 33), (5, 7, 3), (1, 1, 1)]  # tokens, in, out


@dataclass(frozen=True)
class Same:
    """Leaves operands as they are."""

    stochastic: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Projected:
        return Projected(x, 1.0)


CODED = quest(below, Deviations())  # as Quartet's code has it
FORWARD = {"quest": quest(), "coded": CODED, "absmax": absmax(), "nvfp4": nvfp4()}
BACKWARD = {
    "plain": None,
    "mxfp8": mxfp8(),
    "mxfp4": absmax(),
    "aligned": absmax(1.009276),
    "stochastic": absmax(stochastic=True),
}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(k: int, o: int, recipe: Recipe = Recipe(), dtype: torch.dtype = torch.float32) -> Fp4TrainLinear:
    made = Fp4TrainLinear(k, o, recipe=recipe, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(seeded(o, k, seed=1) / k**0.5)
        made.bias.copy_(seeded(o, seed=2))
    return made


def gradients(module: nn.Linear, x: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """The output, and the derivatives of its product with `slope`."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(slope)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in module.named_parameters()}


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def value(projection: Projection, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    found = projection(x, generator)
    return found.values * found.gain


@pytest.mark.parametrize("backward", [None, Same()], ids=["plain", "same"])
@pytest.mark.parametrize(("tokens", "k", "o"), SIZES)
def test_without_rounding_all_is_as_autograd_has_it(tokens: int, k: int, o: int, backward: Projection | None):
    """Rotations, signs and zeros cancel, for sizes that are no multiple of 32 too."""
    made = layer(k, o, Recipe(Same(), backward), torch.float64)
    x, slope = seeded(2, tokens, k, seed=3, dtype=torch.float64), seeded(2, tokens, o, seed=4, dtype=torch.float64)
    plain = nn.Linear(k, o, dtype=torch.float64)
    plain.load_state_dict(made.state_dict())
    wanted = gradients(plain, x, slope)
    for name, found in gradients(made, x, slope).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=1e-12)


def gaussian_error(projection: Projection, sigma: float = 1.0) -> float:
    x = sigma * seeded(2**15, 32, seed=5)
    return ((value(projection, x, torch.Generator().manual_seed(6)) - x) / sigma).square().mean().item()


@pytest.mark.parametrize(
    ("projection", "error"),
    [(absmax(), 0.0137), (absmax(stochastic=True), 0.028), (quest(), 0.013), (CODED, 0.027)],
    ids=["nearest", "stochastic", "quest", "coded"],
)
def test_errors_for_gaussian_values_are_the_papers(projection: Projection, error: float):
    """Table 2 of arXiv:2505.14669. Its 0.0132 for QuEST lies between 0.0127 and 0.0134, as the scale falls."""
    assert gaussian_error(projection) == pytest.approx(error, rel=0.03)


def test_quests_error_over_all_scales():
    over = [gaussian_error(quest(), 2 ** (i / 4)) for i in range(4)]
    assert 0.97 * 0.0127 < sum(over) / 4 < 1.03 * 0.0134


@pytest.mark.parametrize("channel", [0, 1, 31])
def test_quest_keeps_outliers_of_any_channel(channel: int):
    """The first channel of a block becomes its mean, which deviations do not see: then 0.66 is lost, not 0.12."""
    x = seeded(1000, 64, seed=33)
    x[:, channel] += 50
    rotated = turned(x)
    assert relative(value(quest(), rotated), rotated) < 0.13
    assert relative(value(quest(reach=Deviations()), rotated), rotated) > (0.6 if channel == 0 else 0)


def test_alignment_makes_up_for_the_shrinking_of_gaussian_values():
    x = seeded(2**15, 32, seed=7)
    length = lambda projection: ((value(projection, x) * x).mean() / x.square().mean()).item()
    assert length(absmax()) == pytest.approx(1 - 0.0093, abs=1e-3)
    assert length(absmax(1.009276)) == pytest.approx(1, abs=1e-3)


def test_absmax_clips_nothing_and_errs_by_half_a_step():
    x = seeded(500, 32, seed=8) * torch.logspace(-20, 20, 500)[:, None]
    found = absmax()(x)
    scale = 2.0 ** (x.abs().amax(1, keepdim=True).log2().floor() - 2)
    levels = torch.cat([-LEVELS.flip(0), LEVELS]) * scale[..., None]
    nearest = (levels - 0.75 * x[..., None]).abs().argmin(-1, keepdim=True)
    torch.testing.assert_close(found.values, levels.expand(500, 32, -1).gather(-1, nearest)[..., 0])
    assert found.gain == pytest.approx(4 / 3)
    assert ((found.values * found.gain - x).abs() <= 4 / 3 * scale * 1.001).all()  # the longest step is 2


def test_stochastic_rounding_is_unbiased():
    """The mean of n draws of step s deviates by at most s / 2 / sqrt(n), as a standard deviation."""
    x, n = seeded(40, 32, seed=9) * torch.logspace(-6, 6, 40)[:, None], 400
    generator = torch.Generator().manual_seed(10)
    mean = sum(value(absmax(stochastic=True), x, generator) for _ in range(n)) / n
    scale = 4 / 3 * 2.0 ** (x.abs().amax(1, keepdim=True).log2().floor() - 2)
    deviation = (mean - x) / (2 * scale / 2 / n**0.5)  # no step is longer than 2
    assert deviation.abs().max() < 5
    assert deviation.square().mean() < 1.1
    nearest = (value(absmax(), x) - x) / (2 * scale / 2 / n**0.5)
    assert nearest.square().mean() > 10  # and the bound tells them apart


@pytest.mark.parametrize("exponent", ["nearest", "below"])
def test_masks_stop_exactly_what_saturates(exponent: str):
    x = seeded(300, 32, seed=11)
    if exponent == "below":
        found = CODED(x)
        scale = 2.0 ** (2.92247856 * x.std(1, correction=0, keepdim=True) / 6).log2().floor()
    else:
        found = quest()(x)
        scale = 2.0 ** (2.92247856 * x.square().mean(1, keepdim=True).sqrt() / 6).log2().round()
    assert torch.equal(found.kept, x.abs() < 6 * scale)
    assert 0 < (~found.kept).float().mean() < 0.1
    assert torch.equal(found.values[~found.kept], (6 * scale * x.sign())[~found.kept])


def test_the_slope_of_what_was_clipped_is_zero():
    """In the rotated operands: there the derivative of a plain product, with zeros where the mask has them."""
    made = layer(64, 96, Recipe(CODED, None))
    x, slope = seeded(128, 64, seed=12), seeded(128, 96, seed=13)
    found = gradients(made, x, slope)
    a, b = (CODED(turned(side)) for side in (x, made.weight.detach()))
    assert not a.kept.all()
    assert not b.kept.all()
    torch.testing.assert_close(turned(found["x"]), (slope @ b.values) * a.kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned(found["weight"]), (slope.T @ a.values) * b.kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["bias"], slope.sum(0))


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("backward", BACKWARD)
def test_every_recipe_comes_near_the_plain_layer(forward: str, backward: str):
    made = layer(128, 96, Recipe(FORWARD[forward], BACKWARD[backward]))
    x, slope = seeded(256, 128, seed=14), seeded(256, 96, seed=15)
    plain = nn.Linear(128, 96)
    plain.load_state_dict(made.state_dict())
    wanted, found = gradients(plain, x, slope), gradients(made, x, slope)
    bound = 0.4 if forward == "coded" or backward == "stochastic" else 0.24
    for name in ("y", "x", "weight"):
        assert 1e-3 < relative(found[name], wanted[name]) < bound, name
    assert torch.equal(found["bias"], wanted["bias"])


def test_gradients_err_as_their_operands_do():
    """Independent errors of two operands add up: sqrt(2 * MSE) of a product of Gaussian ones."""
    x, slope = seeded(256, 128, seed=16), seeded(256, 96, seed=17)
    exact = gradients(layer(128, 96, Recipe(quest(), None)), x, slope)
    error = lambda way: relative(gradients(layer(128, 96, Recipe(quest(), way)), x, slope)["weight"], exact["weight"])
    for way in (absmax(), absmax(stochastic=True), mxfp8()):
        assert error(way) == pytest.approx((2 * gaussian_error(way)) ** 0.5, rel=0.05)


def test_every_backward_pass_has_signs_of_its_own_and_their_mean_is_nearer():
    made, x, slope = layer(64, 32), seeded(64, 64, seed=18), seeded(64, 32, seed=19)
    exact = gradients(layer(64, 32, Recipe(quest(), None)), x, slope)["weight"]
    passes = [gradients(made, x, slope)["weight"] for _ in range(16)]
    assert not any(torch.equal(one, next_one) for one, next_one in pairwise(passes))
    assert relative(torch.stack(passes).mean(0), exact) < 0.6 * relative(passes[0], exact)


@pytest.mark.parametrize("way", [absmax(), absmax(stochastic=True)], ids=["nearest", "stochastic"])
def test_passes_are_numbered_and_nothing_drawn_elsewhere_matters(way: Projection):
    made, x, slope = layer(64, 32, Recipe(quest(), way)), seeded(64, 64, seed=20), seeded(64, 32, seed=21)
    first = [gradients(made, x, slope)["x"] for _ in range(3)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    resume_(made, 1)
    assert torch.equal(gradients(made, x, slope)["x"], first[1])
    assert torch.equal(torch.get_rng_state(), state)
    other = layer(64, 32, Recipe(quest(), way))
    other.draws = Draws(seed=1)
    assert not torch.equal(gradients(other, x, slope)["x"], first[0])


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 8))
    train_in_few_bits_(model, [TrainRule("*")])
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool):
    x = seeded(50, 40, seed=22).requires_grad_()
    wanted, found = small_model(), small_model()
    for _ in range(2):
        wanted(x).square().sum().backward()
        checkpoint(found, x, use_reentrant=reentrant).square().sum().backward()
    for p, q in zip(wanted.parameters(), found.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("forward", FORWARD)
def test_autocast_computes_in_bf16_what_fp32_computes(forward: str):
    """The operands are exact in bf16: what differs are the last digits of sums and of the incoming derivative."""
    made, x = layer(128, 96, Recipe(FORWARD[forward], None)), seeded(64, 128, seed=23)
    slope = seeded(64, 96, seed=24).bfloat16()
    wanted = gradients(made, x, slope.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(made, x, slope)  # the backward pass too
    assert (found["y"].dtype, found["x"].dtype, found["weight"].dtype) == (torch.bfloat16, *2 * [torch.float32])
    for name in ("y", "x", "weight"):
        assert relative(found[name].float(), wanted[name]) < 2**-8, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype: torch.dtype):
    made = layer(96, 64, dtype=dtype)
    x, slope = seeded(64, 96, seed=25, dtype=dtype), 1e-4 * seeded(64, 64, seed=26, dtype=dtype)
    plain = nn.Linear(96, 64)
    plain.load_state_dict(made.state_dict())
    wanted = gradients(plain, x.float(), slope.float())
    for name, found in gradients(made, x, slope).items():
        assert found.dtype == dtype
        assert relative(found.float(), wanted[name]) < 0.24, name


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("forward", FORWARD)
def test_zeros_stay_zeros(forward: str, backward: str):
    made = layer(70, 40, Recipe(FORWARD[forward], BACKWARD[backward]))
    zeros = gradients(made, torch.zeros(33, 70), torch.zeros(33, 40))
    torch.testing.assert_close(zeros.pop("y"), made.bias.detach().expand(33, 40))
    assert not any(found.any() for found in zeros.values())
    x, slope = seeded(64, 70, seed=27), seeded(64, 40, seed=28)
    x[:32], slope[32:] = 0, 0
    found = gradients(made, x, slope)
    assert all(one.isfinite().all() for one in found.values())
    assert not found["x"][32:].any()


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,)])
def test_no_token_and_one_token(shape: tuple[int, ...]):
    found = gradients(layer(40, 8), torch.ones(shape), torch.ones(*shape[:-1], 8))
    assert found["y"].shape == (*shape[:-1], 8)
    assert found["weight"].any() == bool(prod(shape))


def test_what_is_not_finite_shows():
    x = torch.ones(4, 40)
    x[1, 2] = torch.inf
    assert layer(40, 8)(x)[1].isnan().all()


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on():
    made, x = layer(64, 32), seeded(32, 64, seed=29).requires_grad_()
    made.weight.requires_grad_(False)
    made(x).sum().backward()
    assert made.weight.grad is None
    assert x.grad.any()


def train_in_a_process(rank: int, world: int, folder: str) -> None:
    """Three steps on this process's share of a batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = steps(DistributedDataParallel(small_model()), rank, world)
    if rank == 0:
        Path(folder, "weights").write_bytes(flat(model).numpy().tobytes())
    dist.destroy_process_group()


def steps(model: nn.Module, rank: int = 0, world: int = 1) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, wanted = seeded(3, 128, 40, seed=30), seeded(3, 128, 8, seed=31)
    for inputs, answers in zip(x.chunk(world, 1)[rank], wanted.chunk(world, 1)[rank], strict=True):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), answers).backward()
        optimizer.step()
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_processes_do_what_one_does_with_both_batches(tmp_path: Path):
    """Blocks over tokens do not straddle the processes, whose signs are the same."""
    spawn(train_in_a_process, (2, str(tmp_path)), nprocs=2)
    found = torch.frombuffer(bytearray((tmp_path / "weights").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(found, flat(steps(small_model())), rtol=1e-5, atol=1e-6)
    assert (found - flat(small_model())).norm() > 0.01


def regression(recipe: Recipe | None, count: int = 100) -> float:
    """The loss of a small network at the end, learning what another says."""
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32))
    teacher, student = build(), build()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(3)
    train_in_few_bits_(student, [TrainRule("*", recipe)])
    optimizer, losses = torch.optim.Adam(student.parameters(), 3e-3), []
    for i in range(count):
        x = seeded(256, 64, seed=1000 + i)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return fmean(losses[-20:])


@pytest.mark.unchecked
def test_a_small_network_learns_with_quartet_better_than_with_plain_mxfp4():
    untrained, full, quartet = regression(Recipe(), count=1), regression(None), regression(Recipe())
    assert full < quartet < 0.5 * untrained
    assert quartet < regression(Recipe(absmax(), absmax(stochastic=True)))


def test_rules_name_the_layers_and_parameters_stay_the_same():
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"out": nn.Linear(8, 8), "left": nn.Linear(8, 8)}))
    before = dict(model.named_parameters())
    made = train_in_few_bits_(model, [TrainRule("*.left", None), TrainRule("*", Recipe(nvfp4()))])
    assert list(made) == ["0", "1.out"]
    assert all(before[name] is p for name, p in model.named_parameters())
    assert made["0"].recipe == Recipe(nvfp4())
    assert made["0"].draws.seed != made["1.out"].draws.seed
    assert type(model.get_submodule("1.left")) is nn.Linear
    with pytest.raises(UserError, match=r"no layer is left for the rule '\*\.attn'"):
        train_in_few_bits_(model, [TrainRule("*.attn")])
    assert not train_in_few_bits_(model, [TrainRule("*.attn", optional=True)])


def test_attentions_own_output_layer_is_left_alone():
    """nn.MultiheadAttention reads its weight and never calls it."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    assert list(train_in_few_bits_(model, [TrainRule("*")])) == ["after"]


def test_state_and_mode_are_those_of_the_plain_layer():
    plain = nn.Linear(8, 4).eval()
    made = train_in_few_bits(plain, Recipe())
    assert made.state_dict().keys() == plain.state_dict().keys()
    assert not made.training
    plain.load_state_dict(made.state_dict())


def test_a_stochastic_forward_product_is_refused():
    with pytest.raises(ValueError, match="round it to nearest"):
        Recipe(absmax(stochastic=True))


def test_a_compiled_model_draws_new_signs_too():
    made, x = layer(64, 32), seeded(64, 64, seed=32)
    run = torch.compile(made, backend="eager")
    found = []
    for _ in range(2):
        made.zero_grad()
        run(x).square().sum().backward()
        found.append(made.weight.grad.clone())
    assert not torch.equal(*found)
