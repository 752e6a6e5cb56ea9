"""Every family of models: its units are the model, cost what the design says, and go through all stages."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from fp4dit import calls, policy
from fp4dit.calls import Call
from fp4dit.clock import Clock
from fp4dit.columns import Room
from fp4dit.errors import UserError
from fp4dit.estimate import Estimator
from fp4dit.estimate import calls as samples
from fp4dit.examples import Examples
from fp4dit.footprint import footprint
from fp4dit.formats import integer
from fp4dit.layer import QuantLayer
from fp4dit.machine import Machine
from fp4dit.models.base import Pipeline, Source
from fp4dit.models.dit import DiT
from fp4dit.models.generic import Generic
from fp4dit.models.hunyuan import Hunyuan
from fp4dit.models.pixart import PixArt
from fp4dit.policy import Rule
from fp4dit.prompts import texts
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.reconstruction import Reconstruction, load_calls, load_steps, load_weights_, split
from fp4dit.rounding import ulp
from fp4dit.stream import Rows, Unit, advance, answers, within
from fp4dit.tasks.activate import load_scales_
from fp4dit.tasks.capture import CaptureTask, Chunk, chunked
from fp4dit.tasks.generate import GenerateTask
from fp4dit.tasks.reconstruct import Fit, Rounded
from pipelines.plan import plan
from tests import tiny
from tests.conftest import Compose
from tests.test_end_to_end import FEW, run
from tests.test_stream import chain, forward

TOKEN = Quantizer(integer(8), Granularity("row"))
SMALL = {"height": 32, "width": 32}
SANA = SMALL | {"use_resolution_binning": False, "complex_human_instruction": None, "clean_caption": False}
GROUPS_OF_32 = ["weight.quantizer.granularity.group=32"]


@dataclass(frozen=True)
class Family:
    """How a tiny replica is made, how it is loaded, and the overrides that a run with it needs."""

    save: Callable[[Path], None]
    source: Callable[[str], Source]
    overrides: Sequence[str]


def generic(options: Mapping[str, Any], *overrides: str) -> Mapping[str, Any]:
    given = [f"+model.options.{name}={'null' if value is None else value}" for name, value in options.items()]
    overrides = ("model=generic", *given, *GROUPS_OF_32, *overrides)
    return {"source": partial(Generic, options=options), "overrides": overrides}


FAMILIES = {
    "alpha": Family(
        tiny.save_alpha,
        partial(PixArt, tokens=20),
        ["model=pixart_alpha", "model.tokens=20", "weight.quantizer.granularity.group=16"],
    ),
    "hunyuan": Family(tiny.save_hunyuan, Hunyuan, ["model=hunyuan", *GROUPS_OF_32]),
    "hunyuan_v1_2": Family(
        partial(tiny.save_hunyuan, conditions=False), Hunyuan, ["model=hunyuan_v1_2", *GROUPS_OF_32]
    ),
    "dit": Family(tiny.save_dit, DiT, ["model=dit_xl_2", *GROUPS_OF_32]),
    "sd3": Family(tiny.save_sd3, **generic(SMALL)),
    "flux": Family(tiny.save_flux, **generic(SMALL, "~weight.formats", "weight.by_row=[x_embedder]")),
    "sana": Family(
        tiny.save_sana,
        **generic(
            SANA,
            "~weight.formats",
            "weight.by_row=[patch_embed.*]",
            "+weight.leave=['*.conv_depth']",
            "+activation.leave=['*.attn1.[qkv]']",
        ),
    ),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(family)
    FAMILIES[family].save(made)
    return made


@pytest.fixture(scope="module")
def source(family: str, folder: Path) -> Source:
    return FAMILIES[family].source(str(folder))


@pytest.fixture(scope="module")
def loaded(source: Source) -> Pipeline:
    return source.load()


@pytest.fixture
def pipeline(loaded: Pipeline) -> Pipeline:
    return copy.deepcopy(loaded)


@pytest.fixture
def prompts(family: str) -> list[str]:
    return tiny.CLASSES if family == "dit" else tiny.PROMPTS


def rules(model: nn.Module) -> list[Rule]:
    """4-bit weights, one scale per row; of a model with layers that are called in pieces, the blocks alone."""
    row = tiny.rules()[0].quantizer
    leave = Rule("*.conv_depth", None, optional=True)
    return [leave, Rule("blocks.*" if hasattr(model, "blocks") else "*", row)]


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "quantized"])
@torch.no_grad()
@pytest.mark.unchecked
def test_units_over_captured_calls_answer_as_the_model_did(
    pipeline: Pipeline, prompts: list[str], tmp_path: Path, quantized: bool
):
    if quantized:
        assigned = policy.assign(policy.layers(pipeline.dit), rules(pipeline.dit))
        for layer in policy.quantize_weights_(pipeline.dit, assigned).values():
            layer.prepare().freeze()
        policy.quantize_activations_(pipeline.dit, [Rule("*", TOKEN)])
    with calls.listen(pipeline.dit) as heard:
        CaptureTask(pipeline, tmp_path, 2, 4.5).predict_step(Chunk(0, prompts[:2], [5, 6]))
    states = list(load_steps(tmp_path, trained=2)[0])
    assert [set(state["timestep"].tolist()) for state in states] == [
        set(call.named(pipeline.dit)["timestep"].tolist()) for call in heard
    ]
    for call, state in zip(heard, states, strict=True):
        last = pipeline.units()[-1]
        assert torch.equal(chain(pipeline, state, size=4)[last.answer[0]], forward(pipeline.dit, call)[last.module])


def test_units_hold_every_layer_once_in_execution_order(pipeline: Pipeline, prompts: list[str]):
    units = [unit.module for unit in pipeline.units()]
    owners = [[u for u in units if name == u or name.startswith(f"{u}.")] for name in policy.layers(pipeline.dit)]
    assert all(len(owner) == 1 for owner in owners)
    ran: list[str] = []
    for name in units:
        pipeline.dit.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    pipeline.sample(prompts[:1], [0], 2, 4.5)
    assert ran == units * 2


def test_a_blank_call_is_what_sampling_passes_without_content(source: Source, loaded: Pipeline, prompts: list[str]):
    with calls.listen(loaded.dit) as heard:
        loaded.sample(prompts[:3], [0, 1, 2], 2, 4.5)
    skeleton = source.skeleton()
    made = heard[0]
    blank = skeleton.blank(len(made.named(loaded.dit)["hidden_states"]))
    assert described(blank.named(skeleton.dit)) == described(made.named(loaded.dit))
    assert {x.device.type for x in tree_leaves((blank.args, blank.kwargs)) if isinstance(x, Tensor)} == {"meta"}
    state, heard_state = skeleton.begin(blank), loaded.begin(made)
    assert described(state) == described(heard_state)


def described(given: Any) -> Any:
    """Shape and dtype for each tensor."""
    return tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, Tensor) else x, given)


@torch.no_grad()
def test_a_footprint_has_the_bytes_of_every_column(
    family: str, source: Source, pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    CaptureTask(pipeline, tmp_path, 3, 4.5).predict_step(Chunk(0, prompts[:2], [5, 6]))
    state, own = load_calls(tmp_path), footprint(source.skeleton())
    guidance = 1.0 if family == "flux" else 4.5  # which has it as an argument
    rows = samples(2, 3, guidance)
    each = lambda columns: {name: column[:].nbytes / rows for name, column in columns.items()}
    assert each(state) == own.given | {"prompt": 8}
    for unit, its in zip(pipeline.units(), own.passes, strict=True):
        left = advance(pipeline.dit.get_submodule(unit.module), unit, state, 4, "cpu")
        assert each(left) == its.left
        state = state | left
    machine = Machine(torch.device("cpu"), 1.0, 0, 0, None)
    written = sum(column[:].nbytes for column in load_file(tmp_path / "00000.safetensors").values())
    assert (
        written - Estimator(own, machine, 0.0, torch.float32).captured(2, 3, guidance) == 8 * rows // 3
    )  # whose prompt


@torch.no_grad()
def test_reconstruction_holds_as_many_bytes_as_estimated(
    source: Source, pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    @dataclass
    class Watched(Room):
        most: int = 0

        def column(self, *given: Any) -> Any:
            made = super().column(*given)
            self.most = max(self.most, self.used)
            return made

    tiny.trainer()().predict(CaptureTask(pipeline, tmp_path, 2, 4.5), tiny.one_by_one(chunked(prompts, 2, seed=5)))
    state, room, out = load_calls(tmp_path), Watched(), tmp_path / "units"
    out.mkdir()
    assigned = policy.assign(policy.layers(pipeline.dit), rules(pipeline.dit))
    Reconstruction(pipeline, assigned, Rounded(), *split(state, 3), 8, out, room=room).run(state, tiny.trainer)
    machine = Machine(torch.device("cpu"), 1.0, 0, 0, None)
    estimator = Estimator(footprint(source.skeleton()), machine, 0.0, torch.float32)
    assert room.most == len(state["prompt"]) * estimator.both_streams()


def test_capture_costs_one_pass_and_reconstruction_two(
    family: str, pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    blocks = [unit.module for unit in pipeline.units() if "blocks." in unit.module]
    norms = [pipeline.dit.get_submodule(name).modules() for name in (blocks[0], blocks[-1])]
    seen = [tiny.count(next(m for m in inside if isinstance(m, nn.LayerNorm))) for inside in norms]
    tiny.trainer()().predict(CaptureTask(pipeline, tmp_path, 2, 4.5), tiny.one_by_one(chunked(prompts, 2, seed=5)))
    state, out = load_calls(tmp_path), tmp_path / "units"
    samples = len(state["prompt"])
    assert samples == 4 * 2 * (1 if family == "flux" else 2)  # prompts, steps, with and without the condition
    assert [sum(rows) for rows in seen] == [samples, samples]
    out.mkdir()
    assigned = policy.assign(policy.layers(pipeline.dit), rules(pipeline.dit))
    reports = Reconstruction(pipeline, assigned, Rounded(), *split(state, 3), 8, out).run(state, tiny.trainer)
    assert [sum(rows) for rows in seen] == [3 * samples, 3 * samples]
    errors = {report["unit"]: report["error"] for report in reports}
    assert 0 < errors[blocks[-1]] < 0.5


def columns_of(given: Sequence[tuple[Tensor, ...] | list[Any]]) -> dict[str, Tensor]:
    """What has a row for each sample, of the flattened arguments or answers of several calls, by position."""
    count = len(next(leaf for leaf in given[0] if isinstance(leaf, Tensor)))
    columns = {str(i): leaves for i, leaves in enumerate(zip(*given, strict=True)) if isinstance(leaves[0], Tensor)}
    return {i: torch.cat(leaves) for i, leaves in columns.items() if len(leaves[0]) == count}


def replayed(pipeline: Pipeline, heard: Sequence[Call], fit: Fit, trained: Tensor) -> dict[str, Tensor]:
    """Reconstruction without streams: for each unit both models are run whole, and what the unit is given is noted."""
    original, quantized = copy.deepcopy(pipeline.dit), pipeline.dit
    assigned = policy.assign(policy.layers(quantized), rules(quantized))
    made: dict[str, QuantLayer] = {}
    for described in pipeline.units():
        name = described.module
        answered: list[tuple[Tensor, ...]] = []
        note = lambda _m, _a, out, answered=answered: answered.append(answers(out))
        handle = original.get_submodule(name).register_forward_hook(note)
        with torch.no_grad(), calls.listen(quantized.get_submodule(name)) as given:
            for call in heard:
                call(original)
                call(quantized)
        handle.remove()
        first, spec = tree_flatten((given[0].args, given[0].kwargs))
        inputs, targets = columns_of([tree_leaves((call.args, call.kwargs)) for call in given]), columns_of(answered)

        def again(rows: Rows, first: list[Any] = first, spec: TreeSpec = spec) -> Call:
            return Call(*tree_unflatten([rows.get(str(i), leaf) for i, leaf in enumerate(first)], spec))

        layers = policy.quantize_weights_(quantized, within(assigned, described))
        for layer in layers.values():
            layer.prepare()
        examples = Examples(Unit(name, tuple(inputs), again, tuple(targets)), inputs, targets, trained)
        if layers:
            fit(quantized.get_submodule(name), list(layers.values()), examples, tiny.trainer())
        made |= layers
    return {name: layer.rows for name, layer in made.items()}


@pytest.mark.parametrize("family", ["alpha", "hunyuan", "flux"], indirect=True)
@pytest.mark.unchecked
def test_streams_reconstruct_the_same_bits_as_recording_the_whole_model_for_each_unit(
    pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    pipeline.units()  # runs the model, if that has to be watched
    fit, alone, untouched = tiny.learnt(ulp, steps=5), copy.deepcopy(pipeline), copy.deepcopy(pipeline)
    with calls.listen(pipeline.dit) as heard:
        CaptureTask(pipeline, tmp_path, 2, 4.5).predict_step(Chunk(0, prompts, [1, 2, 3, 4]))
    columns, out = load_calls(tmp_path), tmp_path / "units"
    out.mkdir()
    rows, (trained, held_out) = len(columns["prompt"]) // 2, split(columns, 3)
    assigned = policy.assign(policy.layers(pipeline.dit), rules(pipeline.dit))
    Reconstruction(pipeline, assigned, fit, trained, held_out, rows, out).run(columns, tiny.trainer)
    expected, without = replayed(alone, heard, fit, trained), replayed(untouched, heard, Rounded(), trained)
    learnt = {name: pipeline.dit.get_submodule(name).rows for name in expected}
    assert all(torch.equal(learnt[name], weight) for name, weight in expected.items())
    assert sum(not torch.equal(weight, without[name]) for name, weight in expected.items()) > 10


def test_skeleton_has_the_models_layers_and_no_memory(source: Source, loaded: Pipeline):
    skeleton = dict(source.skeleton().dit.named_parameters())
    assert {n: p.shape for n, p in skeleton.items()} == {n: p.shape for n, p in loaded.dit.named_parameters()}
    assert all(p.is_meta for p in skeleton.values())


def test_each_ones_noise_comes_from_its_own_seed(pipeline: Pipeline, prompts: list[str]):
    both = pipeline.sample(prompts[:2], [1, 2], 2, 4.5)
    assert 0 <= both.min() < both.max() <= 1
    again = pipeline.sample([prompts[0], prompts[1]], [1, 3], 2, 4.5)
    assert torch.equal(both[0], again[0])
    assert not torch.equal(both[1], again[1])


@pytest.mark.unchecked
def test_every_stage_runs_and_what_is_loaded_draws_the_same_bits(
    family: str, folder: Path, source: Source, composed: Compose, tmp_path: Path
):
    given = [f"model.path={folder}", "model.dtype=float32", "metrics=paired", "rounding.steps=3", "rounding.batch=4"]
    given += FAMILIES[family].overrides
    stage = plan(composed(*FEW, *given))["generate"].make()
    paths = run(tmp_path, *given, small=FEW)
    pipeline = source.load()
    activations, _ = load_weights_(pipeline, stage.weight, stage.activation, paths["reconstruct"] / "units")
    load_scales_(activations, paths["activate"] / "scales.safetensors")
    g = stage.generation
    for chunk in chunked(texts(stage.prompts(stage.count)), g.chunk, g.seed):
        GenerateTask(pipeline, tmp_path, g.steps, g.guidance).predict_step(chunk)
    drawn, stored = (sorted(place.glob("*.png")) for place in (tmp_path, paths["generate"] / "images"))
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in stored]
    reference = sorted((paths["reference"] / "images").glob("*.png"))
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(stored, reference, strict=True))


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("one")
    tiny.save_hunyuan(folder)
    return Hunyuan(str(folder)).load()


@pytest.mark.parametrize("named", [False, True])
@torch.no_grad()
def test_the_clock_reads_the_timestep_wherever_it_stands(hunyuan: Pipeline, named: bool):
    class Model(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x

    model, clock = Model(), Clock()
    clock.follow(model)
    t = torch.tensor([7.0, 8.0])
    model(t, timestep=t) if named else model(t, t)
    assert clock.now.tolist() == [7, 8]


@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_queries_and_keys_are_quantized_behind_their_norm_and_rotation_or_before(hunyuan: Pipeline, before: bool):
    """Against the attention's own layers, by hand: RoPE turns queries, and in self-attention keys."""
    dit = copy.deepcopy(hunyuan.dit)
    attention = dit.blocks[0].attn1
    rotation = hunyuan.rotary(torch.zeros(1, 4, 8, 8))
    x, heads = torch.randn(2, 16, tiny.WIDTH), lambda y: y.unflatten(2, (2, 16)).transpose(1, 2)
    normal = lambda y, norm: apply_rotary_emb(norm(y), rotation)
    q, k, v = (heads(layer(x)) for layer in (attention.to_q, attention.to_k, attention.to_v))
    q, k = (
        normal(TOKEN(y), norm) if before else TOKEN(normal(y, norm))
        for y, norm in ((q, attention.norm_q), (k, attention.norm_k))
    )
    product = F.scaled_dot_product_attention(q, k, TOKEN(v))
    expected = attention.to_out[0](product.transpose(1, 2).flatten(2))
    policy.quantize_activations_(dit, [Rule("*", TOKEN, before_norm=before)])
    assert torch.equal(attention(x, image_rotary_emb=rotation), expected)


def test_the_long_skips_pair_the_blocks_from_both_ends(hunyuan: Pipeline):
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(hunyuan.dit.blocks):
        block.register_forward_hook(
            lambda _m, args, given, out, i=i: seen.update({f"in {i}": given.get("skip"), f"out {i}": out}),
            with_kwargs=True,
        )
    hunyuan.sample(tiny.PROMPTS[:1], [0], 1, 4.5)
    pairs = [(i, j) for i in range(6) for j in range(6) if seen[f"in {j}"] is seen[f"out {i}"]]
    assert pairs == [(0, 5), (1, 4)]
    left = {unit.module: unit.answer for unit in hunyuan.units()}
    assert {module: answer for module, answer in left.items() if "skip" in answer[0]} == {
        "blocks.0": ("skip_0",),
        "blocks.1": ("skip_1",),
    }


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("dit")
    tiny.save_dit(folder)
    return DiT(str(folder)).load()


def test_classes_are_numbers_or_names(classes: Pipeline):
    assert [classes.label(given) for given in ["tench", "Tinca tinca", "goldfish", "0", "999"]] == [0, 0, 1, 0, 999]
    assert torch.equal(*(classes.sample([given], [3], 2, 4.0) for given in ["Tinca tinca", "0"]))
    for unknown in ("1000", "-1", "goldfisch", "a red square"):
        with pytest.raises(UserError, match=rf"^'{unknown}' is no class: give a number below 1000, or a name"):
            classes.sample([unknown], [0], 2, 4.0)
    with pytest.raises(UserError, match="such as 'goldfish'"):
        classes.label("goldfisch")


def test_a_transformer_alone_is_completed_by_the_rest(tmp_path: Path):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    tiny.save(whole)
    alone.mkdir()
    (whole / "transformer").rename(alone / "transformer")
    source = PixArt(str(alone), tokens=20, rest=str(whole))
    images = source.load().sample(tiny.PROMPTS[:1], [0], 2, 4.5)
    assert images.shape == (1, 3, 16, 16)
    assert sum(1 for _ in source.skeleton().dit.parameters()) > 0
    with pytest.raises(UserError, match="has no model_index"):
        PixArt(str(alone), tokens=20).load()


def test_folders_from_when_diffusers_had_one_transformer_class_for_all(tmp_path: Path):
    """As PixArt and DiT lie on the hub."""
    tiny.save(tmp_path)
    for file, old in (
        ("model_index.json", "PixArtTransformer2DModel"),
        ("transformer/config.json", "PixArtTransformer2DModel"),
    ):
        path = tmp_path / file
        path.write_text(path.read_text().replace(old, "Transformer2DModel"))
    source = PixArt(str(tmp_path), tokens=20)
    names = dict(source.load().dit.named_parameters())
    assert names.keys() == dict(source.skeleton().dit.named_parameters()).keys()
