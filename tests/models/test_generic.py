"""Tracing finds the units of a transformer, or refuses it with a reason."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, UNet2DModel
from torch import Tensor, nn

import pipelines.inspect
import pipelines.run
from fp4dit.models.blocks import ActivationState, Unit, flatten_outputs
from fp4dit.models.generic import Generic, GenericAdapter
from fp4dit.models.pixart import PixArt
from fp4dit.models.testing import verify_adapter
from fp4dit.models.tracing import list_parts, trace_call
from fp4dit.utils import calls
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.conftest import Run
from tests.helpers import tiny
from tests.helpers.small_runs import FEW, run_stages

OPTIONS = {"max_sequence_length": 20, "use_resolution_binning": False, "clean_caption": False}


def run_unit(unit: Unit, state: ActivationState, index: Any, model: nn.Module) -> tuple:
    """Return the outputs of a unit on some rows of the state."""
    call = unit.make_call(unit.select_inputs(state, index))
    return flatten_outputs(call(model.get_submodule(unit.module)))


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
        return x + self.linear(x) * time[:, None]


class Model(nn.Module):
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
    """Adapter of a transformer alone, whose first call is given."""

    def __init__(self, transformer: nn.Module, first_call: Call) -> None:
        self.transformer = transformer.requires_grad_(False)
        self.first_call, self.device = first_call, torch.device("cpu")
        self.arguments = self.cached_units = None

    def record_first_call(self) -> Call:
        return self.first_call


def make_call(rows: int = 3, **other: Any) -> Call:
    return Call((torch.randn(rows, 4),), {"timestep": torch.rand(rows), **other})


def test_computations_between_blocks_are_repeated():
    adapter = AdapterWithoutPipeline(Model(lambda _, x: x.flip(1) * 2), make_call())
    verify_adapter(adapter, make_call(4))
    assert [(unit.module, unit.inputs, unit.outputs) for unit in adapter.units()] == [
        ("embed", ("latent", "timestep"), ("embed.0",)),
        ("blocks.0", ("timestep", "embed.0"), ("blocks.0.0",)),
        ("blocks.1", ("timestep", "blocks.0.0"), ("blocks.1.0",)),
    ]
    x, timestep = torch.randn(5, 8), torch.rand(5)
    call = adapter.units()[2].make_call({"timestep": timestep, "blocks.0.0": x})
    assert torch.equal(call.args[0], x.flip(1) * 2)
    assert torch.equal(call.args[1], timestep)


def run_embed_again(model: Model, x: Tensor) -> Tensor:
    return model.embed(x[:, :4])


def run_inner_layer(model: Model, x: Tensor) -> Tensor:
    return model.blocks[0].linear(x)  # pyright: ignore[reportCallIssue]


def hide_dependency(_: Model, x: Tensor) -> Tensor:
    return x.detach() + 1


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (run_embed_again, "embed of Model runs more than once"),
        (run_inner_layer, "Model runs blocks.0.linear itself, outside the block that contains it"),
        (hide_dependency, "blocks.1 of Model, called alone, gives another output"),
    ],
)
def test_a_part_that_cannot_be_repeated_is_refused(between: Callable, message: str):
    with pytest.raises(UserError, match=message + ".*docs/guides/your-model.md"):
        AdapterWithoutPipeline(Model(between), make_call()).units()


def test_a_part_must_return_a_row_per_sample():
    model = make_model()
    model.blocks[0].forward = lambda x, time: x.sum(0, keepdim=True)  # pyright: ignore[reportAttributeAccessIssue]
    message = r"blocks\.0 of Model does not return a row for each sample"
    with pytest.raises(UserError, match=message):
        trace_call(model, make_call())


def test_an_argument_without_rows_must_not_change():
    model, scale = make_model(), torch.rand(8)
    arguments = trace_call(model, make_call(scale=scale, flag="on")).arguments
    state = arguments.read_state(model, make_call(5, scale=scale, flag="on"))
    shapes = {name: value.shape for name, value in state.items()}
    assert shapes == {"latent": (5, 4), "timestep": (5,)}
    for name, value in (("scale", scale + 1), ("other.flag", "off")):
        changed = {"scale": scale, "flag": "on"} | {name.removeprefix("other."): value}
        with pytest.raises(UserError, match=re.escape(f"Model: {name} differs from call to call")):
            arguments.read_state(model, make_call(5, **changed))
    with pytest.raises(UserError, match="not called with the same arguments at each step"):
        arguments.read_state(model, make_call(5))


def test_a_single_number_is_repeated_for_each_sample():
    model = make_model()
    call = Call((torch.randn(3, 4),), {"timestep": torch.tensor([0.5])})
    arguments = trace_call(model, call).arguments
    assert arguments.read_state(model, call)["timestep"].tolist() == [0.5] * 3


def test_a_model_without_a_list_of_blocks_is_refused():
    message = r"Sequential has no list of blocks, only 0 \(Linear\)\. Write an adapter"
    with pytest.raises(UserError, match=message):
        list_parts(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_without_a_timestep_is_refused():
    model = make_model()
    model.forward = lambda latent, t: model.blocks[1](model.blocks[0](model.embed(latent), t), t)  # pyright: ignore
    with pytest.raises(UserError, match="not called with an argument `timestep`"):
        trace_call(model, Call((torch.randn(3, 4), torch.rand(3)), {}))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (
            tiny.save_hunyuan,
            "text_embedder of HunyuanDiT2DModel does not return a row for each sample",
        ),
        (tiny.save_dit, "DiTTransformer2DModel runs transformer_blocks.0.norm1.emb"),
    ],
)
def test_models_that_need_their_own_adapter_are_refused(
    save: Callable[[Path], None], message: str, tmp_path: Path
):
    save(tmp_path)
    adapter = Generic(str(tmp_path)).load()
    if save is tiny.save_dit:  # draws classes in place of texts
        adapter.pipe = partial(lambda pipe, _, **options: pipe([1, 2, 3], **options), adapter.pipe)
    with pytest.raises(UserError, match=message):
        adapter.units()


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
    pixart = ["model=pixart_sigma", "model.tokens=20"]
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
