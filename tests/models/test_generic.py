"""Tracing finds the units of a transformer, or refuses it with a reason."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin, PixArtSigmaPipeline, UNet2DModel
from torch import Tensor, nn

import pipelines.inspect
import pipelines.run
from fp4dit.models.blocks import flatten_outputs
from fp4dit.models.call_kinds import CallKind
from fp4dit.models.generic import Generic, GenericAdapter
from fp4dit.models.pixart import PixArt
from fp4dit.models.tracing import list_parts, trace_kind
from fp4dit.numerics.formats import integer
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.quantization.rules import Rule, find_layers
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils import calls
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.conftest import Run
from tests.helpers import tiny
from tests.helpers.small_runs import FEW, run_stages
from tests.helpers.units import check_parts, run_unit

INT8 = Quantizer(integer(8), PerChannel(), AbsMax())

OPTIONS = {"max_sequence_length": 20, "use_resolution_binning": False, "clean_caption": False}


@pytest.mark.parametrize("save", [tiny.save, tiny.save_alpha], ids=["sigma", "alpha"])
@torch.no_grad()
def test_traced_units_compute_the_same_as_written_ones(
    save: Callable[[Path], None], tmp_path: Path
):
    """Each unit of `model=generic` equals that of PixArt's adapter, on any rows."""
    save(tmp_path)
    written = PixArt(str(tmp_path), tokens=20).load()
    traced = Generic(str(tmp_path), options=OPTIONS).load()
    with calls.record_calls(written.transformer) as recorded:
        written.sample(tiny.PROMPTS[:2], [5, 6], 2, 4.5)
    model = written.transformer
    traced_state = traced.initial_state(recorded[1])
    written_state = written.initial_state(recorded[1])
    for traced_unit, written_unit in zip(traced.units(), written.units(), strict=True):
        assert traced_unit.module == written_unit.module
        for index in (torch.tensor([3, 0]), slice(None)):
            traced_outputs = run_unit(traced_unit, traced_state, index, model)
            written_outputs = run_unit(written_unit, written_state, index, model)
            assert all(map(torch.equal, traced_outputs, written_outputs))
        traced_state |= dict(zip(traced_unit.outputs, traced_outputs, strict=True))
        written_state |= dict(zip(written_unit.outputs, written_outputs, strict=True))


# Flux takes no unknown options; PixArt ignores them.
@pytest.mark.parametrize("save", [tiny.save, tiny.save_flux])
@pytest.mark.parametrize("main", [pipelines.run.main, pipelines.inspect.main])
def test_an_unknown_option_is_refused_with_the_nearest_one(
    run: Run, save: Callable[[Path], None], main: Callable, tmp_path: Path, capfd
):
    """The error comes before the weights are read."""
    folder = tmp_path / "model"
    save(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
    overrides = [
        "model=generic",
        f"model.path={folder}",
        "prompts=shapes",
        "+model.options.hieght=32",
    ]
    assert run(*overrides, main=main) == 1
    error = capfd.readouterr().err
    assert "error: " in error
    message = r"model\.options\.hieght: \w+Pipeline has no such option; did you mean height"
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()


def test_the_options_of_a_published_pipeline_are_checked_without_a_network():
    source = Generic("PixArt-alpha/PixArt-XL-2-1024-MS", options={"heigth": 512})
    with pytest.raises(UserError, match="Pipeline has no such option; did you mean height"):
        source.check([])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.seen = x
        return x + self.linear(x) * time[:, None]


class Model(ModelMixin):
    """Model of an embedding and two blocks.

    Args:
        between: Computes the input of the second block from the model and the first block's output.
    """

    def __init__(self, between: Callable[["Model", Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.between = nn.Linear(4, 8), between
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(
        self, latent: Tensor, timestep: Tensor, scale: Tensor | None = None, **other: Any
    ) -> Tensor:
        x = self.blocks[0](self.embed(latent), timestep)
        x = self.between(self, x) if scale is None else x * scale
        return self.blocks[1](x, timestep)


def make_model() -> Model:
    return Model(lambda _, x: x).requires_grad_(False)


class AdapterWithoutPipeline(GenericAdapter):
    """Adapter of a transformer alone, whose first calls are given."""

    def __init__(self, transformer: nn.Module, **other: Any) -> None:
        self.first_calls = make_call(2, **other), make_call(3, **other)
        super().__init__(transformer.requires_grad_(False), {}, load=lambda: None)  # pyright: ignore

    def record_first_calls(self) -> tuple[Call, Call]:
        return self.first_calls


def make_call(rows: int = 3, **other: Any) -> Call:
    return Call((torch.randn(rows, 4),), {"timestep": torch.rand(rows), **other})


@torch.no_grad()
def check_units(adapter: Any, call: Call) -> None:
    """Check that the units, one after another, end in the output of the transformer."""
    [(_, state)] = adapter.read_states(call)
    for unit in adapter.units():
        outputs = run_unit(unit, state, slice(None), adapter.transformer)
        state = state | dict(zip(unit.outputs, outputs, strict=True))
    expected = flatten_outputs(call(adapter.transformer))
    assert all(map(torch.equal, outputs, expected))


def test_computations_between_blocks_are_repeated():
    adapter = AdapterWithoutPipeline(Model(lambda _, x: x.flip(1) * 2))
    check_units(adapter, make_call(4))
    assert [(unit.module, unit.inputs, unit.outputs) for unit in adapter.units()] == [
        ("embed", ("timestep", "latent", "call_kind"), ("embed",)),
        ("blocks.0", ("timestep", "embed", "call_kind"), ("blocks.0",)),
        ("blocks.1", ("timestep", "blocks.0", "call_kind"), ("blocks.1",)),
    ]
    [(_, state)] = adapter.read_states(make_call(5))
    x = torch.randn(5, 8)
    call = adapter.units()[2].make_call(state | {"blocks.0": x})
    assert torch.equal(call.args[0], x.flip(1) * 2)
    assert torch.equal(call.args[1], state["timestep"])


def run_embed_again(model: Model, x: Tensor) -> Tensor:
    return model.embed(x[:, :4])


def run_inner_layer(model: Model, x: Tensor) -> Tensor:
    return model.blocks[0].linear(x)  # pyright: ignore[reportCallIssue]


def read_values(_: Model, x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)


@pytest.mark.parametrize(
    ("between", "modules"),
    [
        (run_embed_again, ["embed", "blocks.0", "embed", "blocks.1"]),
        (run_inner_layer, ["embed", "blocks.0", "blocks.0.linear", "blocks.1"]),
        (read_values, ["embed", "blocks.0", "blocks.1"]),
    ],
)
def test_a_part_may_run_twice_or_inside_another_and_values_may_be_read(
    between: Callable, modules: list[str]
):
    adapter = AdapterWithoutPipeline(Model(between))
    check_units(adapter, make_call(4))
    assert [unit.module for unit in adapter.units()] == modules


def read_hidden_state(model: Model, x: Tensor) -> Tensor:
    return x + model.blocks[0].seen  # pyright: ignore[reportOperatorIssue]


def test_a_model_with_state_outside_of_arguments_is_one_unit(caplog: pytest.LogCaptureFixture):
    adapter = AdapterWithoutPipeline(Model(read_hidden_state))
    check_units(adapter, make_call(4))
    assert [unit.module for unit in adapter.units()] == [""]
    assert "blocks.1 of Model, called alone, gives another output" in caplog.text
    assert "Model is rounded as one unit" in caplog.text


@pytest.mark.parametrize("between", [run_embed_again, run_inner_layer, read_hidden_state])
def test_shared_layers_are_rounded_once_from_original_targets(between: Callable, tmp_path: Path):
    """Rounding to 8 bits changes little, and the teacher of a second run is not quantized."""
    torch.manual_seed(0)
    model = Model(between)
    original, adapter = copy.deepcopy(model), AdapterWithoutPipeline(model)
    call = make_call(8)
    [(_, columns)] = adapter.read_states(call)
    rules = {name: Rule("*", INT8) for name in find_layers(model)}
    rows = torch.arange(8)
    adapter.device = torch.device("cpu")
    work = Reconstruction(adapter, rules, RoundToNearest(), rows[:6], rows[6:], 4, tmp_path)
    reports = work.run(columns, tiny.trainer)
    assert len(reports) == len(adapter.units())
    for name in rules:
        expected = INT8(find_layers(original)[name].weight)  # pyright: ignore[reportArgumentType]
        assert torch.equal(model.get_submodule(name).weight, expected)  # pyright: ignore
    output, target = call(model), call(original)
    error = (output - target)[6:].square().sum() / target[6:].square().sum()
    assert reports[-1]["error"] == pytest.approx(error.item(), rel=1e-4)
    assert 0 < error < 1e-3


def test_a_part_must_return_a_row_per_sample():
    model = make_model()
    model.blocks[0].forward = lambda x, time: x.sum(0, keepdim=True)  # pyright: ignore[reportAttributeAccessIssue]
    kind = CallKind.compare(model, (make_call(2), make_call(3)), (2, 3))
    message = r"blocks\.0 of Model does not return a row for each sample"
    with pytest.raises(UserError, match=message):
        trace_kind(model, kind, list_parts(model))


def test_calls_with_other_values_are_of_other_kinds():
    model, scale = make_model(), torch.rand(8)
    adapter = AdapterWithoutPipeline(model, scale=scale, flag="on")
    numbers = []
    for changed in ({}, {"scale": scale + 1}, {"flag": "off"}, {"scale": None}):
        call = make_call(5, **{"scale": scale, "flag": "on"} | changed)
        [(_, state)] = adapter.read_states(call)
        numbers += state["call_kind"].unique().tolist()
        check_units(adapter, call)
    assert len(set(numbers)) == 4
    again = AdapterWithoutPipeline(model, scale=scale, flag="on").read_states(
        make_call(7, scale=scale, flag="on")
    )
    assert again[0][1]["call_kind"].tolist() == [numbers[0]] * 7


def test_kinds_survive_a_file(tmp_path: Path):
    model, scale = make_model(), torch.rand(8)
    adapter = AdapterWithoutPipeline(model, scale=scale)
    call = make_call(5, scale=scale * 2, names=["a", ("b", 1)])
    [(_, state)] = adapter.read_states(call)
    adapter.save_call_kinds(tmp_path / "00000.safetensors")
    other = AdapterWithoutPipeline(model, scale=scale)
    other.load_call_kinds(tmp_path)
    [unit, *_] = other.units()
    part_call = unit.make_call(state)
    assert torch.equal(part_call.args[0], state["latent"])


def test_a_single_number_is_repeated_for_each_sample():
    call = Call((torch.randn(3, 4),), {"timestep": torch.tensor([0.5])})
    [(_, state)] = AdapterWithoutPipeline(make_model()).read_states(call)
    assert state["timestep"].tolist() == [0.5] * 3


def test_a_model_without_a_list_of_blocks_is_refused():
    message = r"Sequential has no list of blocks, only 0 \(Linear\)\. Write an adapter"
    with pytest.raises(UserError, match=message):
        list_parts(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_without_a_timestep_is_refused():
    model = make_model()
    model.forward = lambda latent, when: latent  # pyright: ignore
    calls_of_two_sizes = [Call((torch.randn(n, 4), torch.rand(n)), {}) for n in (2, 3)]
    with pytest.raises(UserError, match=r"not called with a timestep: none of its .* latent, when"):
        CallKind.compare(model, (calls_of_two_sizes[0], calls_of_two_sizes[1]), (2, 3))


@pytest.mark.parametrize("save", [tiny.save_hunyuan, tiny.save_dit])
def test_a_model_with_its_own_adapter_goes_through_too(
    save: Callable[[Path], None], tmp_path: Path
):
    """HunyuanDiT embeds the tokens of all texts as one list, and DiT runs a layer of a block."""
    save(tmp_path)
    adapter = Generic(str(tmp_path)).load()
    prompts = tiny.PROMPTS
    if save is tiny.save_dit:  # draws classes in place of texts
        prompts = ["1", "2", "3", "4"]
        adapter.name_arguments = lambda inputs, guidance: {  # pyright: ignore
            "class_labels": list(range(len(inputs))),
            "guidance_scale": guidance,
        }
    with calls.record_calls(adapter.transformer) as recorded:
        adapter.sample(prompts[:2], [5, 6], 1, 4.5)
    check_parts(adapter, recorded[0])


def test_a_pipeline_without_a_transformer_is_refused(tmp_path: Path):
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", UNet2DModel.__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for attempt in (Generic(str(tmp_path)).build_on_meta, Generic(str(tmp_path)).load):
        with pytest.raises(UserError, match="holds a DDPMPipeline, which has no transformer"):
            attempt()


def train_three_steps(transformer: nn.Module) -> None:
    """Change all weights, as fine-tuning does."""
    optimizer = torch.optim.Adam(transformer.parameters(), lr=1e-3)
    for _ in range(3):
        output = transformer(
            torch.randn(2, 4, 8, 8),
            encoder_hidden_states=torch.randn(2, 20, tiny.WIDTH),
            timestep=torch.tensor([3, 500]),
            added_cond_kwargs={},
        )
        noise = output.sample[:, :4]
        (noise - torch.randn(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.unchecked
def test_a_traced_model_is_quantized_to_the_same_bits(tmp_path: Path):
    """A fine-tune gets equal weights and images with PixArt's adapter and the generic one."""
    tiny.save(tmp_path / "before")
    pipe: Any = PixArtSigmaPipeline.from_pretrained(tmp_path / "before")
    train_three_steps(pipe.transformer)
    pipe.save_pretrained(tmp_path / "after")
    overrides = [
        "model.dtype=float32",
        "metrics=paired",
        "weight.granularity.size=32",
        "rounding.steps=3",
        "rounding.batch_size=4",
        f"model.path={tmp_path / 'after'}",
    ]
    pixart = ["model=pixart_sigma", "model.tokens=20", "model_layers.sensitive=[]"]
    generic = ["model=generic"]
    generic += [f"+model.options.{name}={value}" for name, value in OPTIONS.items()]
    written, traced = (
        run_stages(tmp_path, *model, *overrides, small=FEW) for model in (pixart, generic)
    )
    patterns = {
        "reconstruct": "units/*.safetensors",
        "generate": "images/*",
        "reference": "images/*",
    }
    for stage, pattern in patterns.items():
        left, right = (sorted(paths[stage].glob(pattern)) for paths in (written, traced))
        assert len(left) == len(right) > 0
        assert [path.read_bytes() for path in left] == [path.read_bytes() for path in right]
