"""A transformer that nobody described: what is found of it is what it does, or it is refused with a reason."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from torch import Tensor, nn

import pipelines.inspect
import pipelines.run
from fp4dit import calls
from fp4dit.calls import Call
from fp4dit.errors import UserError
from fp4dit.models.check import make_tiny, verify
from fp4dit.models.generic import Generic, GenericPipeline
from fp4dit.models.pixart import PixArt
from fp4dit.models.trace import parts, watch
from fp4dit.stream import answers
from tests import tiny
from tests.conftest import Run
from tests.test_end_to_end import FEW, run
from tests.test_published import PUBLISHED

OPTIONS = {"max_sequence_length": 20, "use_resolution_binning": False, "clean_caption": False}


@pytest.mark.parametrize("save", [tiny.save, tiny.save_alpha], ids=["sigma", "alpha"])
@torch.no_grad()
def test_it_makes_the_calls_that_the_described_pixart_makes(save: Callable[[Path], None], tmp_path: Path):
    save(tmp_path)
    described, found = PixArt(str(tmp_path), tokens=20).load(), Generic(str(tmp_path), options=OPTIONS).load()
    assert [unit.module for unit in found.units()] == [unit.module for unit in described.units()]
    with calls.listen(described.dit) as heard:
        described.sample(tiny.PROMPTS[:2], [5, 6], 2, 4.5)
    ours, theirs = found.begin(heard[1]), described.begin(heard[1])
    for mine, wanted in zip(found.units(), described.units(), strict=True):
        some = torch.tensor([3, 0])  # of 4 rows, in another order
        made, expected = (unit.call(unit.rows(state, some)) for unit, state in ((mine, ours), (wanted, theirs)))
        module = described.dit.get_submodule(wanted.module)
        left, right = answers(made(module)), answers(expected(module))
        assert all(map(torch.equal, left, right))
        whole = [unit.call(unit.rows(state, slice(None)))(module) for unit, state in ((mine, ours), (wanted, theirs))]
        ours |= dict(zip(mine.answer, answers(whole[0]), strict=True))
        theirs |= dict(zip(wanted.answer, answers(whole[1]), strict=True))


@pytest.mark.parametrize("main", [pipelines.run.main, pipelines.inspect.main])
@pytest.mark.parametrize("save", [tiny.save, tiny.save_flux])  # which takes what it does not know, and which does not
def test_an_option_that_the_pipeline_does_not_have_is_refused_with_its_like(
    run: Run, save: Callable[[Path], None], main: Callable, tmp_path: Path, capfd
):
    save(tmp_path / "model")
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
    given = ["model=generic", f"model.path={tmp_path / 'model'}", "prompts=shapes", "+model.options.hieght=32"]
    assert run(*given, main=main) == 1
    error = capfd.readouterr().err
    assert "error: " in error
    assert re.search(r"model\.options\.hieght: a \w+Pipeline is called with no such option; did you mean height", error)
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.linear(x) * time[:, None]


class Model(nn.Module):
    """Of two blocks, and something that is computed between them."""

    def __init__(self, between: Callable[["Model", Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.blocks, self.between = nn.Linear(4, 8), nn.ModuleList([Block(), Block()]), between

    def forward(self, latent: Tensor, timestep: Tensor, scale: Tensor | None = None, **other: Any) -> Tensor:
        x = self.blocks[0](self.embed(latent), timestep)
        x = self.between(self, x) if scale is None else x * scale
        return self.blocks[1](x, timestep)


class Alone(GenericPipeline):
    """A transformer without the rest of a pipeline, which is first called so."""

    def __init__(self, dit: nn.Module, first: Call) -> None:
        self.dit, self.first, self.device = dit.requires_grad_(False), first, torch.device("cpu")
        self.arguments = self.chain = None

    def first_call(self) -> Call:
        return self.first


def call(rows: int = 3, **other: Any) -> Call:
    return Call((torch.randn(rows, 4),), {"timestep": torch.rand(rows), **other})


def test_what_lies_between_blocks_is_made_again_from_what_it_reads():
    pipeline = Alone(Model(lambda _, x: x.flip(1) * 2), call())
    verify(pipeline, call(4))
    assert [(unit.module, unit.reads, unit.answer) for unit in pipeline.units()] == [
        ("embed", ("latent", "timestep"), ("embed.0",)),
        ("blocks.0", ("timestep", "embed.0"), ("blocks.0.0",)),
        ("blocks.1", ("timestep", "blocks.0.0"), ("blocks.1.0",)),
    ]
    x, time = torch.randn(5, 8), torch.rand(5)
    made = pipeline.units()[2].call({"timestep": time, "blocks.0.0": x})
    assert torch.equal(made.args[0], x.flip(1) * 2)
    assert torch.equal(made.args[1], time)


def twice(model: Model, x: Tensor) -> Tensor:
    return model.embed(x[:, :4])


def inner(model: Model, x: Tensor) -> Tensor:
    return model.blocks[0].linear(x)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (twice, "embed of Model runs more than once"),
        (inner, "Model runs blocks.0.linear itself, outside the block that owns it"),
        (lambda _, x: x.detach() + 1, "blocks.1 of Model, called alone, answers otherwise"),
    ],
)
def test_what_cannot_be_made_again_is_refused_by_name(between: Callable, message: str):
    with pytest.raises(UserError, match=message + ".*docs/your_model.md"):
        Alone(Model(between), call()).units()


def test_a_part_must_answer_with_rows():
    model = Model(lambda _, x: x).requires_grad_(False)
    model.blocks[0].forward = lambda x, time: x.sum(0, keepdim=True)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"blocks\.0 of Model does not answer with a row for each sample"):
        watch(model, call())


def test_an_argument_without_rows_has_to_stay_what_it_is():
    model = Model(lambda _, x: x).requires_grad_(False)
    scale = torch.rand(8)
    arguments = watch(model, call(scale=scale, flag="on")).arguments
    state = arguments.state(model, call(5, scale=scale, flag="on"))
    assert {name: value.shape for name, value in state.items()} == {"latent": (5, 4), "timestep": (5,)}
    for name, value in (("scale", scale + 1), ("other.flag", "off")):
        changed = {"scale": scale, "flag": "on"} | {name.removeprefix("other."): value}
        with pytest.raises(UserError, match=re.escape(f"Model: {name} differs from call to call")):
            arguments.state(model, call(5, **changed))
    with pytest.raises(UserError, match="not called with the same arguments at each step"):
        arguments.state(model, call(5))


def test_one_number_is_one_for_each_sample():
    model = Model(lambda _, x: x).requires_grad_(False)
    one = Call((torch.randn(3, 4),), {"timestep": torch.tensor([0.5])})
    arguments = watch(model, one).arguments
    assert arguments.state(model, one)["timestep"].tolist() == [0.5] * 3


def test_a_model_without_a_list_of_blocks_or_without_timestep():
    with pytest.raises(UserError, match=r"Sequential has no list of blocks, only 0 \(Linear\)\. Write an adapter"):
        parts(nn.Sequential(nn.Linear(2, 2)))
    model = Model(lambda _, x: x).requires_grad_(False)
    model.forward = lambda latent, t: model.blocks[1](model.blocks[0](model.embed(latent), t), t)  # pyright: ignore
    with pytest.raises(UserError, match="not called with a timestep by that name"):
        watch(model, Call((torch.randn(3, 4), torch.rand(3)), {}))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (tiny.save_hunyuan, "text_embedder of HunyuanDiT2DModel does not answer with a row for each sample"),
        (tiny.save_dit, "DiTTransformer2DModel runs transformer_blocks.0.norm1.emb"),
    ],
)
def test_models_that_need_their_own_adapter_are_refused(save: Callable[[Path], None], message: str, tmp_path: Path):
    save(tmp_path)
    pipeline = Generic(str(tmp_path)).load()
    if save is tiny.save_dit:
        pipeline.pipe = partial(lambda pipe, _, **given: pipe([1, 2, 3], **given), pipeline.pipe)
    with pytest.raises(UserError, match=message):
        pipeline.units()


def test_a_pipeline_without_a_transformer(tmp_path: Path):
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", UNet2DModel.__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for attempt in (Generic(str(tmp_path)).skeleton, Generic(str(tmp_path)).load):
        with pytest.raises(UserError, match=re.escape("holds a DDPMPipeline, which has no transformer")):
            attempt()


@torch.no_grad()
def test_an_adapter_that_forgets_something_is_told_at_which_unit(tmp_path: Path):
    tiny.save(tmp_path)
    pipeline = PixArt(str(tmp_path), tokens=20).load()
    with calls.listen(pipeline.dit) as heard:
        pipeline.sample(tiny.PROMPTS[:2], [5, 6], 2, 4.5)
    verify(pipeline, heard[1])
    begin = pipeline.begin
    pipeline.begin = lambda given: {name: value for name, value in begin(given).items() if name != "bias"}
    units = pipeline.units
    forgetful = lambda unit: replace(unit, call=lambda s: unit.call({**s, "bias": torch.zeros(len(s["text"]), 1, 20)}))
    pipeline.units = lambda: [forgetful(unit) if "blocks" in unit.module else unit for unit in units()]
    with pytest.raises(UserError, match=r"transformer_blocks\.0 of PixArtTransformer2DModel, called alone, answers"):
        verify(pipeline, heard[1])


CONFIGS = {  # besides those of tests.test_published
    "sd3": (SD3Transformer2DModel, {"caption_projection_dim": 1152, "qk_norm": "rms_norm"}),
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "sana": (SanaTransformer2DModel, {}),
}


@pytest.mark.parametrize("model", [*CONFIGS, *PUBLISHED])
def test_a_tiny_replica_has_the_structure_of_the_whole(model: str):
    kind, config = (CONFIGS | PUBLISHED)[model]
    with init_empty_weights():
        whole = kind(**config)
        replica = kind.from_config(make_tiny(whole.config))
    kinds = lambda dit: {(re.sub(r"\d+", "n", name), type(module).__name__) for name, module in dit.named_modules()}
    assert kinds(replica) == kinds(whole)
    assert sum(p.numel() for p in replica.parameters()) < 1e6


@pytest.mark.unchecked
def test_a_fine_tune_is_quantized_to_the_same_bits_described_or_not(tmp_path: Path):
    tiny.save(tmp_path / "before")
    pipe: Any = PixArtSigmaPipeline.from_pretrained(tmp_path / "before")
    optimizer = torch.optim.Adam(pipe.transformer.parameters(), lr=1e-3)
    for _ in range(3):
        given = {"encoder_hidden_states": torch.randn(2, 20, tiny.WIDTH), "timestep": torch.tensor([3, 500])}
        noise = pipe.transformer(torch.randn(2, 4, 8, 8), **given, added_cond_kwargs={}).sample[:, :4]
        (noise - torch.randn(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()
    pipe.save_pretrained(tmp_path / "after")
    given = ["model.dtype=float32", "metrics=paired", "weight.quantizer.granularity.group=32", "rounding.steps=3"]
    given += [f"model.path={tmp_path / 'after'}", "rounding.batch=4"]
    described = run(tmp_path, "model=pixart_sigma", "model.tokens=20", *given, small=FEW)
    options = [f"+model.options.{name}={value}" for name, value in OPTIONS.items()]
    found = run(tmp_path, "model=generic", *options, *given, small=FEW)
    for stage, files in (("reconstruct", "units/*.safetensors"), ("generate", "images/*"), ("reference", "images/*")):
        left, right = (sorted(paths[stage].glob(files)) for paths in (described, found))
        assert len(left) == len(right) > 0
        assert [path.read_bytes() for path in left] == [path.read_bytes() for path in right]
