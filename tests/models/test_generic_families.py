"""Families that nobody wrote an adapter for go through `model=generic`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_flatten

import fp4dit
import pipelines.inspect
from fp4dit.models.generic import Generic
from fp4dit.quantization.rules import assign_rules, find_layers
from fp4dit.utils import calls
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json
from fp4dit.utils.images import read_image
from pipelines.planning.executor import build_stages
from pipelines.planning.plan import make_plan
from tests.conftest import Compose, Run
from tests.helpers import tiny
from tests.helpers.small_runs import run_stages
from tests.helpers.strangers import STRANGERS
from tests.helpers.tiny_families import TINY_FAMILIES, TinyFamily, wan_2_2
from tests.helpers.units import check_parts

pytestmark = pytest.mark.unchecked

# Prompts of different lengths, in one batch.
PROMPTS = tiny.PROMPTS[:2]

# Calibration on prompts of two lengths, and one image.
FEWEST = [
    "calibration.num_prompts=2",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=3",
    "calibration.steps=2",
    "generation.steps=2",
    "prompts.count=1",
]

NEAREST = ["method=nvfp4_rtn", "metrics=paired"]


# The strangers are of three classes that no config, no preset and no code of ours knows.
ALL_FAMILIES = {**TINY_FAMILIES, **STRANGERS}


@pytest.fixture(scope="module", params=list(ALL_FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    """The name of a family."""
    return request.param


@pytest.fixture(scope="module")
def family(name: str) -> TinyFamily:
    return ALL_FAMILIES[name]


@pytest.fixture(scope="module")
def family_folder(name: str, family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the replica."""
    folder = tmp_path_factory.mktemp(name)
    family.save(folder)
    return folder


@torch.no_grad()
def test_streams_are_those_of_the_whole_model(family: TinyFamily, family_folder: Path):
    """The units compute what the transformer computes, bit by bit, in each kind of calls.

    A call whose samples are all of one kind is repeated with the same arguments.
    """
    adapter = Generic(str(family_folder), options=family.options).load()
    assert all(unit.module for unit in adapter.units())  # the transformer is not one unit
    with calls.record_calls(adapter.transformer) as recorded:
        adapter.sample(PROMPTS, [5, 6], 2, 4.5)
    for call in recorded:
        check_parts(adapter, call)
        [(index, state), *others] = adapter.read_states(call)
        if not others:
            repeated = adapter.kinds[int(state["call_kind"][0])].make_call(state)
            assert_equal_arguments(call, repeated, adapter.transformer)
            assert sorted(index.tolist()) == list(range(len(index)))


def assert_equal_arguments(call: calls.Call, other: calls.Call, transformer: Any) -> None:
    """Compare calls; a tensor with a single number may be repeated for each sample."""
    first, second = call.bind_arguments(transformer), other.bind_arguments(transformer)
    leaves, spec = tree_flatten(first)
    other_leaves, other_spec = tree_flatten({name: second[name] for name in first})
    assert spec == other_spec
    for a, b in zip(leaves, other_leaves, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a.expand_as(b), b)
        else:
            assert a == b


def test_layers_before_activations_are_found_by_their_role(
    family: TinyFamily, family_folder: Path, composed: Compose
):
    """`method=fp4dit` fits every family, and gives these layers its other format."""
    overrides = [*family.arguments, f"model.path={family_folder}", "weight.granularity.size=16"]
    plan = make_plan(composed(*overrides, "method=fp4dit"))
    stage: Any = build_stages([plan["reconstruct"], plan["activate"]])["reconstruct"]
    layers = find_layers(stage.model.build_on_meta().transformer)
    found: dict[str, None] = {}
    for rule in assign_rules(layers, stage.weight).values():
        if rule.quantizer and rule.quantizer.format.name == "e3m0":
            found[rule.match] = None
    assert sorted(found) == sorted(family.pre_activation)


def test_all_stages_and_an_export_that_diffusers_loads(
    family: TinyFamily, family_folder: Path, tmp_path: Path
):
    overrides = [*family.arguments, f"model.path={family_folder}", *NEAREST]
    paths = run_stages(tmp_path, *overrides, small=FEWEST, targets=("export",))
    stored = read_image(paths["generate"] / "images" / "00000.png")
    reference = read_image(paths["reference"] / "images" / "00000.png")
    assert stored.shape == reference.shape
    assert not torch.equal(stored, reference)
    pipe: Any = DiffusionPipeline.from_pretrained(paths["export"] / "pipeline")
    assert pipe.transformer.config.quantization_config


@pytest.mark.parametrize("name", ["hidream", "lumina2", "wan_2_2"], indirect=True)
def test_inspect_estimates_all_stages(
    family: TinyFamily, family_folder: Path, run: Run, capfd: pytest.CaptureFixture[str]
):
    overrides = [*family.arguments, f"model.path={family_folder}", *NEAREST]
    assert run(*overrides, main=pipelines.inspect.main) == 0
    output = capfd.readouterr().out
    assert "quantized: " in output
    assert "reconstruct" in output


def test_the_two_transformers_of_a_pipeline_are_quantized_one_after_the_other(
    tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str]
):
    """The second run starts from the export of the first, and both stay quantized."""
    family = TINY_FAMILIES["wan_2_2"]
    folder = tmp_path / "wan_2_2"
    family.save(folder)
    unchosen = [x for x in family.arguments if not x.startswith("model.transformer")]
    assert run(*unchosen, f"model.path={folder}", *NEAREST) == 1
    message = "has 2 transformers, transformer and transformer_2: stages=experts quantizes both"
    assert message in capfd.readouterr().err
    for component in ("transformer", "transformer_2"):
        overrides = [*unchosen, f"model.path={folder}", f"model.transformer={component}", *NEAREST]
        paths = run_stages(tmp_path, *overrides, small=FEWEST, targets=("export",))
        folder = paths["export"] / "pipeline"
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert transformer.config.quantization_config


def test_a_run_quantizes_both_transformers_and_exports_them_together(tmp_path: Path):
    """Each transformer gets the weights that a run of it alone gives it, from its own calls."""
    family = TINY_FAMILIES["wan_2_2"]
    folder = tmp_path / "wan_2_2"
    family.save(folder)
    arguments = [x for x in family.arguments if not x.startswith("model.transformer")]
    arguments += [f"model.path={folder}", *NEAREST]
    paths = run_stages(tmp_path, *arguments, "stages=experts", small=FEWEST, targets=("export",))
    pipe: Any = DiffusionPipeline.from_pretrained(paths["export"] / "pipeline")
    scalars = read_json(paths["score"] / "metrics.json")["scalars"]
    sizes = []
    for component in EXPERTS:
        choice = f"model.transformer={component}"
        alone = run_stages(tmp_path, *arguments, choice, small=FEWEST, targets=("export",))
        other: Any = DiffusionPipeline.from_pretrained(alone["export"] / "pipeline")
        expected = getattr(other, component).state_dict()
        state = getattr(pipe, component).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        sizes.append(read_json(alone["reconstruct"] / "audit.json")["checkpoint_bytes"])
        drawn = read_image(alone["generate"] / "images" / "00000.png")
        assert not torch.equal(read_image(paths["generate"] / "images" / "00000.png"), drawn)
    assert scalars["checkpoint_bytes"] == sum(sizes)
    card = (paths["export"] / "pipeline" / "README.md").read_text()
    assert "The 2 transformers take together" in card
    assert "pipeline_tag: text-to-video" in card
    assert ").frames[0]" in card


EXPERTS = ("transformer", "transformer_2")
EXPERT_OPTIONS = [f"+model.options.{x}" for x in ("height=16", "width=16", "num_frames=5")]


@pytest.fixture
def experts() -> Any:
    """A pipeline with two transformers, and with noise from which both of them draw."""
    torch.manual_seed(0)
    return wan_2_2()


def test_python_quantizes_both_transformers(experts: Any, tmp_path: Path):
    """Without a choice it quantizes both; each one alone gives the same weights."""
    alone = copy.deepcopy(experts)
    for component in EXPERTS:
        choice = f"model.transformer={component}"
        report = fp4dit.quantize(alone, "nvfp4_rtn", overrides=[*EXPERT_OPTIONS, choice])
        assert [*report.components] == [component]
        assert report.bits_weight < 16
    expected = fp4dit.inspect(experts, "nvfp4_rtn", overrides=EXPERT_OPTIONS)
    assert [*expected.components] == [*EXPERTS]
    report = fp4dit.quantize(experts, "nvfp4_rtn", overrides=EXPERT_OPTIONS)
    assert [*report.components] == [*EXPERTS]
    assert report.bits_weight == expected.bits_weight < 16
    assert report.bytes == sum(audit.bytes for audit in report.transformers)
    for component in EXPERTS:
        states = getattr(experts, component).state_dict(), getattr(alone, component).state_dict()
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name])
    experts.save_pretrained(tmp_path / "saved")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    for component in EXPERTS:
        assert getattr(pipe, component).config.quantization_config


def test_python_calibrates_each_transformer_on_its_own_calls(experts: Any):
    """The blocks of both have errors, and a method that finds no calls changes nothing."""
    overrides = [*EXPERT_OPTIONS, "calibration.batch_size=2", "weight.granularity.size=16"]
    with pytest.raises(UserError, match="in none of its 1 steps"):
        fp4dit.quantize(experts, "gptq", prompts=PROMPTS, overrides=overrides, steps=1)
    for component in EXPERTS:
        assert not hasattr(getattr(experts, component).config, "quantization_config")
    report = fp4dit.quantize(experts, "gptq", prompts=PROMPTS, overrides=overrides, steps=4)
    errors = [dict(audit.block_errors) for audit in report.transformers]
    assert errors[0].keys() == errors[1].keys()
    assert errors[0] != errors[1]
    assert len(report.block_errors) == 2 * len(errors[0])


def test_a_comparison_changes_neither_transformer(experts: Any):
    options: dict[str, Any] = {"prompts": PROMPTS[:1], "steps": 4, "overrides": EXPERT_OPTIONS}
    comparison = fp4dit.compare(experts, ["nvfp4_rtn"], **options)
    assert comparison.methods[1].values["psnr"][0] < 100
    assert [*(comparison.methods[1].report or {}).components] == [*EXPERTS]  # pyright: ignore
    for component in EXPERTS:
        assert not hasattr(getattr(experts, component).config, "quantization_config")
