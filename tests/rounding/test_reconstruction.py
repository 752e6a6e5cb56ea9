"""Test block reconstruction: its errors, that it is repeatable and resumes, and its loss."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fp4dit.calibration.dataset import UnitBatches, UnitDataset
from fp4dit.calibration.layer_inputs import iter_layer_inputs
from fp4dit.data.columns import DiskTensor, MemoryBudget
from fp4dit.models.blocks import ActivationState, Unit
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.quantizer import PerTensor, PerToken, Quantizer
from fp4dit.numerics.rounding import StochasticRounding
from fp4dit.numerics.scale_rules import MinMax
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer, make_quant_layer
from fp4dit.quantization.observers import SampleObserver
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.adaround import adaround, adaround_scale_aware
from fp4dit.rounding.base import Curve, RoundingMethod
from fp4dit.rounding.gptq import GPTQ
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.learned import LearnedRounding, ReconstructionTask
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.rounding.preparation import sample_inputs
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.rounding.signround import SignRound, SignSGD
from fp4dit.rounding.unit_files import load_weights_
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import Smoothing
from fp4dit.utils.calls import Call
from tests.helpers import tiny


def make_linear_unit(width: int = 32) -> tuple[Unit, ActivationState, nn.Linear]:
    """Make a linear unit with correlated inputs, for which rounding to nearest is far from best."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(192, 5, 6, generator=g) @ torch.randn(6, width, generator=g)
    torch.manual_seed(0)
    linear = nn.Linear(width, 16).requires_grad_(False)
    return Unit("", ("x",), lambda s: Call((s["x"],), {}), ("y",)), {"x": x}, linear


def measure_error(method: RoundingMethod, affine: bool) -> float:
    """Return the relative error of the hard weights on validation rows."""
    unit, state, linear = make_linear_unit()
    target = {"y": linear(state["x"])}
    layer = make_quant_layer(linear, tiny.rules(affine=affine)[1].quantizer).prepare()
    method.round_unit(
        layer, [layer], UnitDataset(unit, state, target, torch.arange(128)), tiny.trainer()
    )
    assert layer.learnable_rounding is None
    val_target = target["y"][128:]
    noise = layer(state["x"][128:]) - val_target
    return (noise.square().sum() / val_target.square().sum()).item()


@pytest.mark.parametrize(
    ("affine", "learner", "lr"),
    [(False, adaround, 0.05), (False, adaround_scale_aware, 0.003), (True, adaround, 0.05)],
)
def test_adaround_beats_nearest_on_validation_rows(affine: bool, learner: Callable, lr: float):
    nearest = measure_error(RoundToNearest(), affine)
    # A weak rounding loss leaves roundings undecided after so few steps, and making them hard
    # would undo the gain.
    method = tiny.learned_rounding(learner, steps=150, lr=lr, objective=RelativeMSE(weight=10.0))
    assert measure_error(method, affine) < 0.5 * nearest


def make_calls(pipeline: PixArtAdapter) -> ActivationState:
    """Return calls of 8 prompts at 2 timesteps, of which the last 2 prompts are for validation."""
    g = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(16, 4, 8, 8, generator=g),
        "timestep": torch.tensor([900] * 8 + [100] * 8),
        "text": torch.randn(16, 5, tiny.WIDTH, generator=g),
        "bias": torch.zeros(16, 1, 5),
        "prompt": torch.arange(16) % 8,
    }


def reconstruct_pipeline(
    pipeline: PixArtAdapter,
    out: Path,
    method: RoundingMethod,
    rules: list[Rule] | None = None,
    **options: Any,
) -> list[dict]:
    out.mkdir(exist_ok=True)
    state = make_calls(pipeline)
    assigned = assign_rules(find_layers(pipeline.transformer), rules or tiny.rules())
    train_rows = (state["prompt"] < 6).nonzero().flatten()
    val_rows = (state["prompt"] >= 6).nonzero().flatten()
    reconstruction = Reconstruction(
        pipeline, assigned, method, train_rows, val_rows, 8, out, **options
    )
    return reconstruction.run(state, tiny.trainer)


@pytest.mark.parametrize(
    "method",
    [
        tiny.learned_rounding(adaround_scale_aware, steps=6),
        GPTQ(),
        LayerwiseReconstruction(RoundToNearest()),
    ],
    ids=["learnt", "gptq", "layerwise"],
)
def test_columns_in_files_change_no_bit(
    loaded: PixArtAdapter, tmp_path: Path, method: RoundingMethod
):
    for name, memory in (("memory", MemoryBudget()), ("files", MemoryBudget(0))):
        reconstruct_pipeline(copy.deepcopy(loaded), tmp_path / name, method, memory=memory)
    assert read_folder(tmp_path / "memory") == read_folder(tmp_path / "files")


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(Exception):
    pass


@dataclass(frozen=True)
class FunctionMethod(RoundingMethod):
    """A rounding method that calls a function."""

    function: Callable[..., Curve]

    def round_unit(self, *args: Any) -> Curve:
        return self.function(*args)


def raise_at_unit(method: RoundingMethod, unit: int) -> RoundingMethod:
    """Return a method that raises `Killed` at the unit of this number."""
    num_units = itertools.count(1)

    def round_or_raise(*args: Any) -> Any:
        if next(num_units) == unit:
            raise Killed
        return method.round_unit(*args)

    return FunctionMethod(round_or_raise)


def test_a_killed_run_resumes_at_the_unit_and_ends_bit_equal(loaded: PixArtAdapter, tmp_path: Path):
    method, rounded = tiny.learned_rounding(adaround_scale_aware, steps=6), []

    def count_units(*args: Any) -> Any:
        rounded.append(1)
        return method.round_unit(*args)

    whole, again, killed = (copy.deepcopy(loaded) for _ in range(3))
    reports = reconstruct_pipeline(whole, tmp_path / "whole", method)
    with pytest.raises(Killed):
        reconstruct_pipeline(killed, tmp_path / "resumed", raise_at_unit(method, 4))
    (tmp_path / "resumed" / "004_transformer_blocks.0.safetensors").write_bytes(b"half a file")
    assert len(list((tmp_path / "resumed").glob("*.json"))) == 3
    resumed = reconstruct_pipeline(again, tmp_path / "resumed", FunctionMethod(count_units))
    assert resumed == reports
    assert len(rounded) == len(loaded.units()) - 3
    assert read_folder(tmp_path / "resumed") == read_folder(tmp_path / "whole")
    assert len(read_folder(tmp_path / "whole")) == 4 * len(
        loaded.units()
    )  # two files with their checksums
    for a, b in zip(
        whole.transformer.state_dict().values(),
        again.transformer.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)

    fresh = copy.deepcopy(loaded)
    load_weights_(fresh, tiny.rules(), [], tmp_path / "whole")
    for a, b in zip(
        whole.transformer.state_dict().values(),
        fresh.transformer.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_order_of_rows_depends_on_the_seed():
    unit, state, linear = make_linear_unit()
    dataset = UnitDataset(unit, state, {"y": linear(state["x"])}, torch.arange(0, 192, 2))

    def order(seed: int) -> Tensor:
        batches = iter(UnitBatches(dataset, 40, seed))
        return torch.stack([next(batches).rows["x"][:, 0, 0] for _ in range(12)])

    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4))
    epochs = order(3).flatten().view(-1, 96)  # 5 epochs of 96 rows are 12 batches of 40
    expected = state["x"][::2, 0, 0].sort().values
    assert all(torch.equal(epoch.sort().values, expected) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_each_unit_has_a_report(pipeline: PixArtAdapter, tmp_path: Path):
    reports = reconstruct_pipeline(pipeline, tmp_path / "nearest", RoundToNearest())
    assert [r["unit"] for r in reports] == [unit.module for unit in pipeline.units()]
    assert all(0 < r["error"] < 1 for r in reports)
    assert all(r["curve"] == [] for r in reports)


def test_a_unit_without_quantized_layers_has_no_error(pipeline: PixArtAdapter, tmp_path: Path):
    rules = [Rule("pos_embed.proj", None), Rule("proj_out", None), tiny.rules()[1]]
    reports = reconstruct_pipeline(
        pipeline, tmp_path / "units", tiny.learned_rounding(adaround, steps=2), rules
    )
    assert reports[0]["error"] == 0
    assert reports[0]["curve"] == []
    assert reports[3]["error"] > 0


def test_relative_mse_by_hand():
    output, target = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    objective, noise = RelativeMSE(weight=0.5), output - target
    error = objective.error((output, output[:, 0]), (target, target[:, 0]))
    torch.testing.assert_close(error, noise.square().mean() + noise[:, 0].square().mean())
    loss = objective(torch.tensor(6.0), torch.tensor(4.0), torch.tensor(40.0), 100)
    assert loss.item() == pytest.approx(6 / 4 + 0.5 * 40 / 100)


def record_rounding_loss(
    method: LearnedRounding,
) -> tuple[list[float], list[Any], ReconstructionTask]:
    """Learn a layer, and return beta and the rounding loss of each step, and the task."""
    betas, rounding_losses = [], []

    class RecordingMSE(RelativeMSE):
        def __call__(
            self, error: Tensor, nearest: Tensor, rounding_loss: Tensor | float, count: int
        ) -> Tensor:
            betas.append(task.beta)
            rounding_losses.append(float(rounding_loss))
            return super().__call__(error, nearest, rounding_loss, count)

    method = replace(method, objective=RecordingMSE())
    unit, state, linear = make_linear_unit()
    dataset = UnitDataset(unit, state, {"y": linear(state["x"])}, torch.arange(128))
    layer = make_quant_layer(linear, tiny.rules()[1].quantizer).prepare()
    task = ReconstructionTask(layer, [layer], dataset, method)
    tiny.trainer()(max_steps=method.steps).fit(task)
    return betas, rounding_losses, task


def test_the_warmup_has_no_rounding_loss_and_beta_falls_linearly():
    betas, rounding_losses, _ = record_rounding_loss(tiny.learned_rounding(adaround, steps=50))
    assert len(betas) == 50
    assert rounding_losses[:10] == [0.0] * 10
    assert all(value > 0 for value in rounding_losses[10:])
    assert betas[:11] == [20.0] * 11
    torch.testing.assert_close(torch.tensor(betas[10:]), torch.linspace(20, 2, 41)[:-1])


def test_the_curve_starts_near_0_and_ends_at_the_last_step():
    _, _, task = record_rounding_loss(tiny.learned_rounding(adaround, steps=50))
    # The soft weights are the weights at first. Errors are shares of that of rounding to nearest.
    assert task.curve[0]["error"] < 0.01
    assert task.curve[-1]["step"] == 49
    assert [point["step"] for point in task.curve] == sorted(point["step"] for point in task.curve)


STATIC = Quantizer(integer(8, signed=False), PerTensor(), MinMax())
SELECTED = Quantizer(FormatSelection([floating(3, 4), floating(4, 3)], LeastError()), PerTensor())
JOINT = [
    Rule("*.ff.*", SELECTED, observer=SampleObserver()),
    Rule("proj_out", None),
    Rule("*", STATIC, observer=SampleObserver()),
]
TRANSFORM_RULES = [
    tiny.rules()[0],
    Rule("*", tiny.rules()[1].quantizer, [Smoothing(), Hadamard(), LowRank(2)]),
]


def run_transformer(pipeline: PixArtAdapter) -> Tensor:
    state = make_calls(pipeline)
    with torch.no_grad():
        return pipeline.transformer(
            state["latent"],
            encoder_hidden_states=state["text"],
            timestep=state["timestep"],
            return_dict=False,
        )[0]


@pytest.mark.parametrize(
    ("method", "joint"),
    [
        (tiny.learned_rounding(adaround_scale_aware, steps=2), ()),
        (RoundToNearest(StochasticRounding(1)), JOINT),
    ],
    ids=["learnt", "joint"],
)
def test_transforms_and_static_inputs_resume_and_load_bit_equal(
    loaded: PixArtAdapter, tmp_path: Path, method: RoundingMethod, joint: Sequence[Rule]
):
    whole, killed, again, fresh = (copy.deepcopy(loaded) for _ in range(4))
    reports = reconstruct_pipeline(
        whole, tmp_path / "whole", method, TRANSFORM_RULES, activation=joint
    )
    with pytest.raises(Killed):
        reconstruct_pipeline(
            killed,
            tmp_path / "resumed",
            raise_at_unit(method, 5),
            TRANSFORM_RULES,
            activation=joint,
        )
    assert (
        reconstruct_pipeline(again, tmp_path / "resumed", method, TRANSFORM_RULES, activation=joint)
        == reports
    )
    assert read_folder(tmp_path / "resumed") == read_folder(tmp_path / "whole")
    assert all(0 < report["error"] < 0.1 for report in reports)
    activations, _ = load_weights_(fresh, TRANSFORM_RULES, joint, tmp_path / "whole")
    assert torch.equal(run_transformer(fresh), run_transformer(whole))
    assert torch.equal(run_transformer(again), run_transformer(whole))
    original = run_transformer(loaded)
    noise = run_transformer(whole) - original
    assert 0 < noise.square().mean() < 0.05 * original.square().mean()
    layers = {name: m for name, m in whole.transformer.named_modules() if isinstance(m, QuantLayer)}
    quantized_inputs = set()
    for name, layer in layers.items():
        if isinstance(layer.input_fake_quant, FakeQuantize):
            quantized_inputs.add(name)
    assert quantized_inputs == (layers.keys() - {"proj_out"} if joint else set())
    # The reconstruction has calibrated the inputs of layers, but not the operands of attention.
    calibrated = set()
    for name, fake_quant in activations.items():
        if fake_quant.qparams is not None:
            calibrated.add(name)
    assert calibrated == quantized_inputs
    assert all(name.endswith((".q", ".k", ".v")) for name in activations.keys() - calibrated)


def make_two_layers(
    activation: Quantizer | None = None,
) -> tuple[nn.Sequential, list[QuantLayer], UnitDataset]:
    """Return a sequence of two layers with transforms, for inputs with large channels."""
    unit, state, _ = make_linear_unit()
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)).requires_grad_(False)
    module, x = copy.deepcopy(original), state["x"] * torch.where(torch.arange(32) < 2, 5.0, 1.0)
    dataset = UnitDataset(unit, {"x": x}, {"y": original(x)}, torch.arange(0, 192, 2))
    inputs = sample_inputs(original, ["0", "2"], dataset, dataset.train_rows)
    for i in (0, 2):
        module[i] = make_quant_layer(
            module[i], tiny.rules()[1].quantizer, [Smoothing(), LowRank(1)]
        )
        if activation:
            module[i].input_fake_quant = FakeQuantize(activation)
        module[i].prepare(inputs[str(i)])
    return module, [module[0], module[2]], dataset


def test_sampled_inputs_are_those_of_the_original_layers():
    _, _, dataset = make_two_layers()
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)).requires_grad_(False)
    inputs = sample_inputs(original, ["0", "2"], dataset, dataset.train_rows[::4])
    x = dataset.inputs["x"][::8]
    assert torch.equal(inputs["0"], x)
    torch.testing.assert_close(inputs["2"], original[:2](x))


@pytest.mark.parametrize(
    "activation", [None, Quantizer(integer(4), PerToken())], ids=["plain", "quantized"]
)
def test_layer_inputs_are_those_of_the_matmuls(activation: Quantizer | None):
    module, layers, dataset = make_two_layers(activation)
    idle = make_quant_layer(nn.Linear(32, 3), tiny.rules()[1].quantizer)
    batches = list(iter_layer_inputs(module, [*layers, idle], dataset, dataset.train_rows, 40))
    assert [len(x) for x, _, _ in batches] == [40, 40, 16]
    assert all(x is None for _, _, x in batches)
    expected: list[Tensor] = []

    def multiply(original_multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        expected.append(x)
        return original_multiply(x)

    for layer in layers:
        layer.multiply = partial(multiply, layer.multiply)
    with torch.no_grad():
        module(dataset.inputs["x"][::2])
    for i in range(2):
        torch.testing.assert_close(torch.cat([inputs[i] for inputs in batches]), expected[i])
    changed = layers[0].prepare_input(dataset.inputs["x"])[0] - dataset.inputs["x"]
    assert changed.abs().max() > 0.1
    assert not any(layer.input_fake_quant._forward_hooks for layer in layers)


def measure_layer_errors(method: RoundingMethod) -> list[float]:
    """Return the error of each layer's matmul, for the inputs that it has after rounding."""
    module, layers, dataset = make_two_layers()
    full = [layer.weight_matrix.clone() for layer in layers]
    method.round_unit(module, layers, dataset, tiny.trainer())
    [inputs] = iter_layer_inputs(module, layers, dataset, dataset.train_rows, 96)
    return [
        (x @ (layer.weight_matrix - w).T).square().sum().item()
        for x, layer, w in zip(inputs, layers, full, strict=True)
    ]


def test_layerwise_reconstruction_beats_nearest():
    method = LayerwiseReconstruction(
        tiny.learned_rounding(adaround, steps=100, lr=0.05, objective=RelativeMSE(weight=10.0))
    )
    nearest = measure_layer_errors(LayerwiseReconstruction(RoundToNearest()))
    learned = measure_layer_errors(method)
    assert nearest == measure_layer_errors(RoundToNearest())
    assert all(a < 0.7 * b for a, b in zip(learned, nearest, strict=True))


def test_layerwise_inputs_are_those_of_quantized_layers():
    module, layers, dataset = make_two_layers()
    inputs_and_noise: list[tuple[Tensor, Tensor]] = []

    def round_and_record(
        product: nn.Module, layers: list[QuantLayer], dataset: UnitDataset, trainers: Any
    ) -> Curve:
        x = dataset.inputs["x"]
        inputs_and_noise.append((x, dataset.targets["y"] - layers[0].multiply(x)))
        return RoundToNearest().round_unit(product, layers, dataset, trainers)

    x = dataset.inputs["x"][::2]
    unquantized = layers[1].prepare_input(module[:2](x))[0]
    idle = make_quant_layer(nn.Linear(32, 3), tiny.rules()[1].quantizer).prepare()
    expected = idle.weight_fake_quant(idle.weight_matrix)
    LayerwiseReconstruction(FunctionMethod(round_and_record), batch_size=40).round_unit(
        module, [*layers, idle], dataset, tiny.trainer()
    )
    assert torch.equal(idle.weight_matrix, expected)
    assert len(inputs_and_noise) == 2
    torch.testing.assert_close(inputs_and_noise[1][0], layers[1].prepare_input(module[:2](x))[0])
    assert (inputs_and_noise[1][0] - unquantized).abs().max() > 0.01
    # The targets are the products with the weight in full precision.
    assert all(noise.abs().max() < 1e-5 for _, noise in inputs_and_noise)


def test_layerwise_rows_in_files_change_no_bit(tmp_path: Path):
    weights: list[list[Tensor]] = []
    kinds: list[type] = []

    def round_and_record(
        product: nn.Module, layers: list[QuantLayer], dataset: UnitDataset, trainers: Any
    ) -> Curve:
        kinds.extend((type(dataset.inputs["x"]), type(dataset.targets["y"])))
        return tiny.learned_rounding(adaround, steps=5).round_unit(
            product, layers, dataset, trainers
        )

    for memory in (MemoryBudget(), MemoryBudget(0, tmp_path)):
        module, layers, dataset = make_two_layers()
        LayerwiseReconstruction(FunctionMethod(round_and_record), batch_size=40).round_unit(
            module, layers, replace(dataset, memory=memory), tiny.trainer()
        )
        weights.append([layer.weight_matrix for layer in layers])
    assert kinds == [Tensor] * 4 + [DiskTensor] * 4
    assert all(map(torch.equal, *weights))


def round_layer(method: LearnedRounding) -> Tensor:
    unit, state, linear = make_linear_unit()
    layer = make_quant_layer(linear, tiny.rules()[1].quantizer)
    dataset = UnitDataset(unit, state, {"y": linear(state["x"])}, torch.arange(method.batch_size))
    method.round_unit(layer.prepare(), [layer], dataset, tiny.trainer())
    return layer.weight_matrix.clone()


def test_a_learning_rate_of_0_changes_nothing():
    zero_schedule = partial(LambdaLR, lr_lambda=lambda step: 0.0)
    nearest = round_layer(tiny.learned_rounding(adaround, steps=1, lr=0.0))
    assert torch.equal(
        round_layer(tiny.learned_rounding(adaround, steps=10, lr=1.0, schedule=zero_schedule)),
        nearest,
    )
    assert not torch.equal(round_layer(tiny.learned_rounding(adaround, steps=10, lr=1.0)), nearest)


def test_the_schedule_advances_at_each_step():
    rates: list[float] = []

    class RecordingSGD(SignSGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    halving = partial(LambdaLR, lr_lambda=lambda step: 0.5**step)
    round_layer(
        replace(
            tiny.learned_rounding(SignRound, steps=10, schedule=halving),
            optimizer=partial(RecordingSGD, lr=0.5),
        )
    )
    assert rates == [0.5 ** (step + 1) for step in range(10)]


def test_the_best_step_is_kept():
    """The steps are so long that the error soon grows."""
    errors: list[float] = []

    class RecordingMSE(RelativeMSE):
        def error(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
            errors.append(super().error(output, target).item())
            return super().error(output, target)

    # 8 rows are one batch, so that every step sees the same error.
    method = replace(
        tiny.learned_rounding(SignRound, steps=12, objective=RecordingMSE(0.0)),
        optimizer=partial(SignSGD, lr=0.06),
    )
    _, state, linear = make_linear_unit()
    full = linear.weight.clone()

    def compute_error(weight: Tensor) -> float:
        return (state["x"][:8] @ (weight - full).T).square().mean().item()

    last, best = round_layer(method), round_layer(replace(method, keep_best=True))
    assert compute_error(best) == pytest.approx(min(errors), rel=1e-4)
    assert compute_error(best) < 0.9 * compute_error(last)
    assert compute_error(best) < 0.9 * errors[0]  # the error of rounding to nearest
